# SPDX-License-Identifier: Apache-2.0
"""Where the network runs: batches, worker processes."""
