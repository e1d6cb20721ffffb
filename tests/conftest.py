# SPDX-License-Identifier: Apache-2.0
"""The slow tests, in one place: `make quick` leaves them out, `make test` runs them."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parent

# Files, or FILE::TEST, of tests that take more than about five seconds on two cores, in the call or in its fixtures.
SLOW = (
    "benchmarks/test_gpu_device_layer.py",
    "benchmarks/test_gpu_kernels.py",
    "benchmarks/test_gpu_networks.py",
    "benchmarks/test_gpu_stages.py",
    "benchmarks/test_gpu_times.py",
    "docs/test_commands.py::test_the_commands_run_word_for_word",
    "docs/test_python_api.py",
    "exporter/test_checkpoint.py::test_random_models_use_every_part",
    "exporter/test_export.py",
    "exporter/test_export_command.py::test_checkpoint_to_file",
    "exporter/test_export_command.py::test_full_disk_leaves_nothing",
    "exporter/test_export_command.py::test_interrupt_leaves_nothing",
    "exporter/test_hostile_checkpoints.py::test_damaged_checkpoints_run_nothing_and_are_told_in_one_line",
    "exporter/test_mask2former_export.py",
    "exporter/test_rewrites.py::test_labels_are_those_of_the_plain_export",
    "exporter/test_tensorrt_rtx.py",
    "ground/test_architecture.py::test_mypy_sees_across_the_rooms",
    "ground/test_bare_environment.py",
    "ground/test_hostile_files.py::test_damaged_files_are_told_in_one_line",
    "runtime/test_augmentation.py::test_probabilities_and_labels_are_those_of_pytorch",
    "runtime/test_augmentation.py::test_a_model_of_fixed_size_flips_the_part_that_shows_the_image",
    "runtime/test_engine_build.py",
    "runtime/test_engine_fusion.py",
    "runtime/test_engine_gelu.py::test_every_gelu_of_an_export_becomes_one_node",
    "runtime/test_engine_parsers.py::test_every_exported_operator_can_be_read",
    "runtime/test_engine_precision.py",
    "runtime/test_engine_compile.py::test_an_engine_with_the_plugin_inside",
    "runtime/test_engine_compile.py::test_the_plugin_lies_beside_the_engine",
    "runtime/test_engine_types.py",
    "runtime/test_golden_models.py",
    "runtime/test_mask2former_engine.py",
    "runtime/test_mask2former_pipeline.py",
    "runtime/test_plugin_folds.py::test_a_whole_network_computes_the_same_labels",
    "runtime/test_plugin_folds.py::test_the_end_of_mask2former_is_the_same",
    "runtime/test_segmenter.py::test_the_public_names_have_their_types",
    *(
        f"runtime/test_window.py::test_{name}"
        for name in (
            "a_model_slides_as_its_card_says",
            "a_network_of_fixed_size_and_batch_slides_in_crops_of_its_own",
            "whole_images_and_other_windows_on_demand",
            "probabilities_of_a_file_that_returns_labels",
            "the_model_in_memory_is_sound_and_has_no_more_than_the_logits_need",
            "the_memory_of_crops_is_known_before_the_network_runs",
            "the_commands",
        )
    ),
    "serving/test_attacks.py",
    "serving/test_costly_images.py",
    "serving/test_faults.py",
    "serving/test_fuzz.py",
    "serving/test_load.py",
    "serving/test_page.py",
    "serving/test_ray.py",
    "test_toy_street.py",
    "test_toy_street_mask2former.py",
    "trt_plugins/test_build.py",
    "trt_plugins/test_cross_compile.py",
    "trt_plugins/test_half_labels.py",
    "trt_plugins/test_sanitizers.py",
)


def pytest_collection_modifyitems(items):
    slow = set(SLOW)
    for item in items:
        file = item.path.relative_to(TESTS).as_posix()
        if {file, f"{file}::{item.originalname}"} & slow:
            item.add_marker(pytest.mark.slow)
