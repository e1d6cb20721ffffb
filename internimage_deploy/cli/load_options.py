# SPDX-License-Identifier: Apache-2.0
"""The options for loading and running a model, and their values as one argument, `LoadOptions`."""

from __future__ import annotations

import functools
from dataclasses import fields
from typing import Any

from internimage_deploy.cli.options import (
    Command,
    apply_options,
    augmentation_options,
    backend_option,
    batch_option,
    engine_options,
    max_pixels_option,
    resize_option,
    threads_option,
    window_of,
    window_options,
)
from internimage_deploy.runtime.imaging.image_io import MAX_PIXELS
from internimage_deploy.runtime.options import LoadOptions


def takes_load_options(command: Command) -> Command:
    """Pass the values of the options of a model as one argument, `options`, to `command`.

    These are the options that are called as fields of `LoadOptions`, and `window_options`.
    """

    @functools.wraps(command)
    def call(*arguments: Any, **values: Any) -> Any:
        window = window_of(*(values.pop(name) for name in ("slide", "whole", "crop", "stride")))
        found = {field.name: values.pop(field.name) for field in fields(LoadOptions) if field.name in values}
        return command(*arguments, options=LoadOptions(window=window, **found), **values)

    return call  # type: ignore[return-value]


def load_options(command: Command) -> Command:
    """The options of a model that segments images; `command` gets them as `options`."""
    return apply_options(
        resize_option,
        batch_option(1),
        window_options,
        augmentation_options,
        max_pixels_option(MAX_PIXELS),
        backend_option,
        engine_options,
        threads_option,
        takes_load_options,
    )(command)
