# SPDX-License-Identifier: Apache-2.0
"""Images and engines: model card, pre- and post-processing, backends, engine building. Never imports torch."""
