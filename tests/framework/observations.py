"""The table of observations: every exported name, and what about it has golden values."""

import json
from functools import partial

import observe_export as export
import observe_modeling as modeling
import observe_structures as structures
import observe_training as training
from observe_structures import leaves
from providers import BUILTIN

# One observation for each name of dfm_d2.framework that a provider supplies.
BY_NAME = {
    "Backbone": modeling.observe_backbone,
    "BoxMode": structures.observe_box_mode,
    "Boxes": structures.observe_boxes,
    "CfgNode": structures.observe_cfg_node,
    "DatasetCatalog": structures.observe_dataset_catalog,
    "DatasetEvaluator": training.observe_dataset_evaluator,
    "DetectionCheckpointer": modeling.observe_detection_checkpointer,
    "EvalHook": training.observe_eval_hook,
    "EventStorage": training.observe_event_storage,
    "HookBase": training.observe_hook_base,
    "ImageList": structures.observe_image_list,
    "Instances": structures.observe_instances,
    "IterationTimer": training.observe_iteration_timer,
    "JSONWriter": training.observe_json_writer,
    "LRScheduler": training.observe_lr_scheduler,
    "META_ARCH_REGISTRY": modeling.observe_build_model,
    "MetadataCatalog": structures.observe_metadata_catalog,
    "PathManager": structures.observe_path_manager,
    "PeriodicCheckpointer": training.observe_periodic_checkpointer,
    "PeriodicWriter": training.observe_periodic_writer,
    "TensorboardXWriter": training.observe_tensorboard_writer,
    "TracingAdapter": export.observe_tracing_adapter,
    "TrainerBase": training.observe_trainer_base,
    "batched_nms": structures.observe_batched_nms,
    "build_backbone": modeling.observe_build_backbone,
    "build_lr_scheduler": training.observe_build_lr_scheduler,
    "build_model": modeling.observe_build_model,
    "comm": structures.observe_comm,
    "configurable": structures.observe_configurable,
    "default_argument_parser": training.observe_default_argument_parser,
    "detector_postprocess": modeling.observe_detector_postprocess,
    "get_cfg": structures.observe_get_cfg,
    "get_event_storage": training.observe_get_event_storage,
    "inference_on_dataset": training.observe_inference_on_dataset,
    "seed_all_rng": structures.observe_seed_all_rng,
}

# More about the backbones: too much for one observation.
BACKBONES = {
    "parameters R18": partial(modeling.observe_parameters, depth=18),
    "parameters R50": partial(modeling.observe_parameters, depth=50),
    "outputs R18 BN": partial(modeling.observe_outputs, depth=18, norm="BN"),
    "outputs R18 no norm": partial(modeling.observe_outputs, depth=18, norm=""),
    "outputs R50 FrozenBN": partial(modeling.observe_outputs, depth=50, norm="FrozenBN"),
    "outputs R50 GN, stride in 3x3, mean": partial(
        modeling.observe_outputs,
        depth=50,
        norm="GN",
        options=("MODEL.RESNETS.STRIDE_IN_1X1", False, "MODEL.FPN.FUSE_TYPE", "avg", "MODEL.FPN.NORM", "GN"),
    ),
    "outputs R50 in groups": partial(
        modeling.observe_outputs,
        depth=50,
        norm="FrozenBN",
        options=("MODEL.RESNETS.NUM_GROUPS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 4),
    ),
    "gradients": modeling.observe_gradients,
    "freezing": modeling.observe_freezing,
}

# Too large, or too much torch's own, for golden values: compared only where both providers are present.
LIVE_ONLY = {
    "parameters R34": partial(modeling.observe_parameters, depth=34),
    "parameters R101": partial(modeling.observe_parameters, depth=101),
    "seeded initialisation": modeling.observe_seeded_initialisation,
}


# Keys that a Detectron2 older than the given commit has not; April 2024 is the oldest that is tested.
LATER_KEYS = {"FLOAT32_PRECISION": "5b72c27a (August 2024)"}


def unused_config_keys(detectron2) -> dict:
    """Full name and default of each key of Detectron2's config that the builtin subset does not honour."""
    honoured = dict(leaves(BUILTIN.get_cfg()))
    return {name: value for name, value in leaves(detectron2.get_cfg()) if name not in honoured}


def as_json(value):
    """The observation as it is after a trip through JSON: tuples are lists, keys are words, NaN is None."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


def differences(seen, wanted, tolerance: float, path: str = "") -> list[str]:
    """Where two observations differ; floats may differ by `tolerance`, relative and absolute."""
    if isinstance(seen, dict) and isinstance(wanted, dict):
        if list(seen) != list(wanted):
            return [f"{path}: keys or their order differ: {sorted(set(seen) ^ set(wanted)) or 'order'}"]
        return [d for key in seen for d in differences(seen[key], wanted[key], tolerance, f"{path}/{key}")]
    if isinstance(seen, list) and isinstance(wanted, list):
        if len(seen) != len(wanted):
            return [f"{path}: {len(seen)} items, wanted {len(wanted)}"]
        pairs = enumerate(zip(seen, wanted))
        return [d for i, (a, b) in pairs for d in differences(a, b, tolerance, f"{path}/{i}")]
    both_numbers = (
        isinstance(seen, float) and isinstance(wanted, (int, float)) and not isinstance(wanted, bool)
    )
    if both_numbers:
        close = abs(seen - wanted) <= tolerance * max(1.0, abs(wanted))
        return [] if close else [f"{path}: {seen}, wanted {wanted}"]
    same = seen == wanted and type(seen) is type(wanted)
    return [] if same else [f"{path}: {seen!r}, wanted {wanted!r}"]
