# SPDX-License-Identifier: Apache-2.0
"""Pictures and engines: model card, pre- and post-processing, backends, engine building. Never imports torch."""
