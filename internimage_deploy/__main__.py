# SPDX-License-Identifier: Apache-2.0
"""`python -m internimage_deploy` is `internimage-deploy`."""

from internimage_deploy.cli.start import main

main()
