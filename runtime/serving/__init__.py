# SPDX-License-Identifier: Apache-2.0
"""Segmentation over HTTP.

One direction: `app` (routes) -> `service` (picture to answer) -> `engine` (batching) -> `pool` (worker processes).
`engine` has a twin for clusters in `ray_serve`; the application is the same.
"""
