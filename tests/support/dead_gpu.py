# SPDX-License-Identifier: Apache-2.0
"""A worker process whose GPU dies on one kind of image."""

import dataclasses

from internimage_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from internimage_deploy.runtime.gpu.device import DeviceError
from internimage_deploy.runtime.serving.settings import ModelSettings

DEADLY = 13
"""First value of an image on which the GPU dies."""


class SettingsOfADeadGpu(ModelSettings):
    """Settings that, read by a worker process, let its backend fail as after an illegal memory access."""

    def __reduce__(self):
        return _read_by_the_worker, (self.path, self.options)


def _read_by_the_worker(path, options):
    run = OnnxRuntimeBackend.run

    def dying_run(self, batch):
        if (batch[:, 0, 0, 0] == DEADLY).any():
            raise DeviceError("cuEventSynchronize failed: an illegal memory access was encountered (error 700)", 700)
        return run(self, batch)

    OnnxRuntimeBackend.run = dying_run
    return ModelSettings(path, dataclasses.replace(options, backend="onnxruntime"))
