"""Checkpoints that survive a kill at any moment, run no code, and say what is wrong with them."""

import logging
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from dfm_d2 import __version__
from dfm_d2.data.files import write_atomically, write_text_atomically
from dfm_d2.engine.folder import LAST
from dfm_d2.engine.hooks import gather_state
from dfm_d2.engine.keys import lookup
from dfm_d2.engine.setup import check_weights
from dfm_d2.engine.stop import Stopped, StopSignals
from dfm_d2.engine.weights import DAMAGE, check_pixels, load_tensors, read_weights
from dfm_d2.errors import CheckpointError, UserError
from dfm_d2.framework import PROVIDER, CfgNode, DetectionCheckpointer, HookBase, PathManager, comm
from dfm_d2.local_update.processes import all_processes, gather_objects
from dfm_d2.safe_yaml import read_yaml

# The entry of a checkpoint that says what made it: version, provider, class names, config.
ABOUT = "dfm_d2"
# The checkpoint of the end, and the one that stands in for the periodic ones until the next of them.
FINAL, LATEST = "model_final", "model_latest"
MINUTES = 5.0  # so long after the last checkpoint another one follows

_logger = logging.getLogger(__name__)

# Keys that say what the weights of any model mean and that their names and shapes do not show.
MEANING = (
    "MODEL.META_ARCHITECTURE",
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
    "INPUT.FORMAT",
    "MODEL.RESNETS.STRIDE_IN_1X1",
    "MODEL.TIMM.NAME",
)
# Keys of models' `meaning` that are no keys any more: what all configs mean now.
FORMER = {"MODEL.DFM.PREDICTION": "endpoint", "MODEL.DFM.TIME": "INTERVALS, and its predictors embed u"}


class SafeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, with atomic writes, safe reads and errors instead of silent skips.

    ``load(path)`` continues or evaluates a run: every parameter must be there with its shape, and the classes
    must be the same. ``load(path, [])`` takes weights to start from: heads may differ, but something must
    match. Either way, weights whose pixels are known must be of those that the config makes.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        cfg: CfgNode | None = None,
        class_names: Sequence[str] = (),
        **checkpointables: Any,
    ):
        """
        cfg: the run's config, saved and compared with that of what is loaded; None compares nothing.
        class_names: of the data set, in order; saved and compared, too.
        """
        super().__init__(model, save_dir, **checkpointables)
        self.cfg = cfg
        self.class_names = list(class_names)
        self.made: list[str] = []  # the periodic checkpoints that the run has written and not removed
        self._whole = False
        self._path = ""

    def save(self, name: str, **extra: Any) -> None:
        """Write ``<save_dir>/<name>.pth`` and then make it the one that --resume takes.

        A crash at any moment leaves the file that was there before; ``last_checkpoint`` names a whole one.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        parts = {"model": self.model, **self.checkpointables}
        data: dict[str, Any] = {key: part.state_dict() for key, part in parts.items()} | extra
        data[ABOUT] = {
            "version": __version__,
            "provider": PROVIDER,
            "class_names": self.class_names,
            "config": "" if self.cfg is None else self.cfg.dump(),
        }
        path = Path(self.save_dir) / f"{name}.pth"
        write_atomically(path, lambda file: torch.save(data, file))
        self.tag_last_checkpoint(path.name)
        _logger.info("Saved %s", path)

    def finish(self, path: str) -> None:
        """Make the checkpoint ``path`` of a training at its end the final one, where a kill left none."""
        final = Path(self.save_dir) / f"{FINAL}.pth"
        with open(path, "rb") as made:
            write_atomically(final, lambda file: shutil.copyfileobj(made, file))
        self.tag_last_checkpoint(final.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Make --resume take this file of ``save_dir``."""
        write_text_atomically(Path(self.save_dir) / LAST, last_filename_basename)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load ``path`` (a file or a URL) into the model, and ``checkpointables`` (all: None), as said above.

        Returns the entries that nothing took. Raises CheckpointError or UserError, one line.
        """
        local = _fetch(path) if path else ""
        self._whole, self._path = checkpointables is None, path
        try:
            extra = super().load(local, checkpointables)
            if type(extra.get("iteration", 0)) is not int:
                raise ValueError("its iteration is no whole number")
            if self._whole and isinstance(made := extra.get("checkpoints"), list):
                self.made = [name for name in made if re.fullmatch(r"model_\d{7}", str(name))]
            return extra
        except UserError:
            raise
        except DAMAGE as error:  # of a state that is damaged, or not that of this run
            said = " ".join(str(error).split())[:300] if isinstance(error, ValueError) else repr(error)[:300]
            raise CheckpointError(f"{path} cannot be loaded: {said}.") from error
        finally:
            # Detectron2 asserts at the next load that this one came to its end.
            self._parsed_url_during_load = None

    def _load_file(self, filename: str) -> dict[str, Any]:
        """As ``read_weights`` has it; UserError for pixels of others than the config makes."""
        content, source = read_weights(filename)
        if source is not None and self.cfg is not None:
            check_pixels(self.cfg, source, filename)
        return content

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        """Load ``checkpoint["model"]``; what does not fit is an error (the class says when)."""
        if self._whole:
            self._check_run(_about(checkpoint, self._path))
            if missing := [part for part in self.checkpointables if part not in checkpoint]:
                raise CheckpointError(
                    f"{self._path} has no {missing[0]}, which a run continues from: give it as MODEL.WEIGHTS."
                )
            self._check_shapes(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        missing = set(incompatible.missing_keys) | {key for key, _, _ in incompatible.incorrect_shapes}
        # torch takes counters of batch norms as there where a file is of before they were.
        unsaid = (".num_batches_tracked", *getattr(self.model, "set_by_config", ()))
        if {name for name in self.model.state_dict() if not name.endswith(unsaid)} <= missing:
            raise CheckpointError(
                f"Nothing in {self._path} matches this model: check MODEL.WEIGHTS and the backbone's keys."
            )
        frozen = (name for name, value in self.model.named_parameters() if not value.requires_grad)
        random = next((name for name in frozen if name in missing), None)
        if random is not None:
            raise CheckpointError(
                f"{self._path} has no {random}, which this run keeps frozen and would leave random: "
                "give weights that have it, or set MODEL.DFM.BACKBONE_UPDATE accumulate and "
                "MODEL.BACKBONE.FREEZE_AT 0."
            )
        return incompatible

    def _check_run(self, about: Mapping[str, Any]) -> None:
        """CheckpointError if the weights were trained for other classes, or mean something else by a key."""
        saved = about["class_names"]
        if saved and self.class_names and saved != self.class_names:
            raise CheckpointError(
                f"{self._path} was trained for the classes {', '.join(saved)}, but the data set has "
                f"{', '.join(self.class_names)}: use its data set, or set DATASETS.CLASSES to its classes in "
                "its order."
            )
        configs = about["config"], read_yaml(self.cfg.dump()) if self.cfg else {}
        meant = getattr(self.model, "meant", lookup)
        for key in (*MEANING, *getattr(self.model, "meaning", ())):
            then, now = (meant(config, key) for config in configs)
            now = FORMER.get(key) if now is None else now
            if then is not None and now is not None and then != now:
                remedy = "version of dfm_d2" if key in FORMER else "config"
                raise CheckpointError(
                    f"{self._path} was trained with {key} {then}, but the config has {now}: its weights mean "
                    f"something else there; use the {remedy} that it was trained with."
                )

    def _check_shapes(self, saved: Mapping[str, Any]) -> None:
        """CheckpointError unless ``saved`` has the entries of the model with their shapes, and no others.

        Those of training only may be there or not: checkpoints of one update mode load in another.
        """
        model = self.model.state_dict()
        for name in (*model, *saved):
            if name in model and name in saved:
                found, wanted = (tuple(state[name].shape) for state in (saved, model))
                if found == wanted:
                    continue
                problem = f"{name} with the shape {found}, this run's model {wanted}"
            elif name.startswith(getattr(self.model, "training_only", ())):
                continue
            elif name in model:
                problem = f"no {name}, which this run's model has"
            else:  # a predictor too many is no harmless rest: the others were trained on intervals beside it
                problem = f"{name}, which this run's model does not have"
            raise CheckpointError(f"{self._path} has {problem}: use the config that it was trained with.")


class CheckpointHook(HookBase):
    """Saves every ``period`` iterations, MINUTES after the last time, when asked to stop, and after the last
    iteration; keeps the newest few, also over a resume, and removes no file but those that the run has made.

    All processes have it, the main one writes. Within ``signals`` it ends a training that is asked to stop.
    """

    def __init__(self, checkpointer: SafeCheckpointer, period: int, keep: int, writers=(), log_period=1):
        """
        keep: how many periodic checkpoints stay; 0: all.
        writers: event writers flushed before each save, so that metrics.json is never behind a checkpoint.
        log_period: when they write anyway; a save that the clock asks for waits for it, and adds no line.
        """
        self.checkpointer, self.period, self.keep, self.writers = checkpointer, period, keep, list(writers)
        self.log_period, self.signals = log_period, StopSignals()

    def before_train(self) -> None:
        self._saved = time.monotonic()
        self._remove_old()  # a kill may have left some

    def after_step(self) -> None:
        """Save when it is time to; raises Stopped in all processes where one was asked to stop."""
        iteration, done, made = self.trainer.iter, self.trainer.iter + 1, self.checkpointer.made
        late = done % self.log_period == 0 and time.monotonic() - self._saved >= 60 * MINUTES
        asked = gather_objects((self.signals.caught, late), all_processes())
        stop, is_last = max(signum for signum, _ in asked), done >= self.trainer.max_iter
        names = [f"model_{iteration:07d}"] if done % self.period == 0 else []
        made += names
        names += [FINAL] if is_last else []
        names = names or ([LATEST] if stop or asked[0][1] else [])
        if not names:
            return
        gather_state(self.trainer)
        for writer in self.writers:
            writer.write()
        for name in names:
            self.checkpointer.save(name, iteration=iteration, checkpoints=list(made))
        self._remove_old(*{LATEST} - {*names})
        self._saved = time.monotonic()
        if is_last:
            self.signals.__exit__()  # nothing is left to be saved
        if stop:
            comm.synchronize()  # the main process is still writing
            if self.checkpointer.save_to_disk:
                said = "Asked to stop: iteration %d is saved (%s.pth), the same command with --resume goes on"
                _logger.warning(said, iteration, names[-1])
            self.trainer.failed = True
            raise Stopped(stop)

    def _remove_old(self, *others: str) -> None:
        made = self.checkpointer.made
        old = [made.pop(0) for _ in made[: -self.keep]] if self.keep else []
        for name in (*old, *others) if self.checkpointer.save_to_disk else ():
            (Path(self.checkpointer.save_dir) / f"{name}.pth").unlink(missing_ok=True)


def class_names_of(path: str) -> list[str]:
    """The classes that a checkpoint was trained for; none where it does not say. Raises CheckpointError."""
    local = _fetch(path)
    content = {} if local.endswith(".pkl") else load_tensors(local)
    return _about(content, path)["class_names"] if isinstance(content, dict) else []


def _about(checkpoint: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Class names and config, read, of what made a checkpoint; CheckpointError if they are damaged."""
    about = checkpoint.get(ABOUT, {})
    try:
        names, config = list(about.get("class_names", [])), read_yaml(about.get("config") or "{}")
        if all(isinstance(name, str) for name in names) and isinstance(config, dict):
            return {"class_names": names, "config": config}
    except (*DAMAGE, yaml.YAMLError):
        pass
    raise CheckpointError(f"{path} is damaged (its entry {ABOUT}): take another checkpoint.")


def _fetch(path: str) -> str:
    """The local file of a path or URL; CheckpointError saying what to do when there is none."""
    check_weights(path)
    try:
        return PathManager.get_local_path(path)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"Could not fetch {path} ({error}): download it where there is a network and set MODEL.WEIGHTS "
            "to the local file."
        ) from error
