# SPDX-License-Identifier: Apache-2.0
"""Segmentation over HTTP.

The layers from the top: `http` (routes, request bodies, responses) -> `service` (an image to its labels) ->
`execution.executor` -> `execution.batcher` -> `execution.pool` (worker processes). On a Ray cluster another executor
takes the place of the local one (`runtime/cluster/serve.py`); the layers above it are the same.
"""
