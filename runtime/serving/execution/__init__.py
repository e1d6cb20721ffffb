# SPDX-License-Identifier: Apache-2.0
"""Running the network: batches of images, and the worker processes they run in."""
