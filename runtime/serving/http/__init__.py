# SPDX-License-Identifier: Apache-2.0
"""The HTTP side of the service: routes, request bodies, responses, the page."""
