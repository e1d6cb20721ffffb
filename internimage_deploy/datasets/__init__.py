# SPDX-License-Identifier: Apache-2.0
"""Class names and palettes of the data sets that the released models were trained on."""
