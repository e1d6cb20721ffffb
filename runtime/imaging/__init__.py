# SPDX-License-Identifier: Apache-2.0
"""Images from files to network input, and from network output to label maps."""
