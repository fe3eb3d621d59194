"""What can be observed of a provider's schedule, loop, hooks, events, commands, as in observe_structures."""

import os
import tempfile
from contextlib import suppress
from functools import partialmethod

import torch
from observe_structures import raised


def _optimizer(rates, sizes):
    parameters = [[torch.nn.Parameter(torch.zeros(2)) for _ in range(size)] for size in sizes]
    return torch.optim.SGD([{"params": own, "lr": rate} for own, rate in zip(parameters, rates)], lr=0.1)


def _curve(provider, options, iterations: int = 40):
    cfg = provider.get_cfg()
    cfg.merge_from_list(["SOLVER.MAX_ITER", iterations, "SOLVER.WARMUP_ITERS", 7, *options])
    optimizer = _optimizer(rates=(0.5, 0.05), sizes=(1, 2))
    scheduler, rates = provider.build_lr_scheduler(cfg, optimizer), []
    for _ in range(iterations):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return {"rates": rates, "state": scheduler.state_dict()}


def observe_build_lr_scheduler(provider):
    cosine, step = ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"], ["SOLVER.STEPS", (20,)]
    options = {"steps": ["SOLVER.STEPS", (20, 30)], "steps beyond the end": ["SOLVER.STEPS", (20, 300)]}
    options |= {"step inside warm-up": ["SOLVER.STEPS", (3, 30)]}
    options |= {"no warm-up": [*step, "SOLVER.WARMUP_ITERS", 0]}
    options |= {"warm-up longer than training": [*step, "SOLVER.WARMUP_ITERS", 90]}
    options |= {"constant warm-up": [*step, "SOLVER.WARMUP_METHOD", "constant"], "cosine": cosine}
    options |= {"cosine with end": [*cosine, "SOLVER.BASE_LR", 0.5, "SOLVER.BASE_LR_END", 0.1]}
    options |= {"rescaled cosine": [*cosine, "SOLVER.RESCALE_INTERVAL", True]}
    unknown = raised(lambda: _curve(provider, ["SOLVER.LR_SCHEDULER_NAME", "Other"]))
    unknown_warmup = raised(lambda: _curve(provider, ["SOLVER.WARMUP_METHOD", "other"]))
    curves = {name: _curve(provider, words) for name, words in options.items()}
    return curves | {"unknown": unknown, "unknown warm-up": unknown_warmup}


def _train(provider, hooks=(), start: int = 0, end: int = 0, stop_at=None, log=None):
    """A trainer that has put the scalars "loss" (iteration squared) and broke off at iteration `stop_at`."""
    log = [] if log is None else log

    class Trainer(provider.TrainerBase):
        optimizer = _optimizer(rates=(0.5, 0.05), sizes=(1, 3))

        def run_step(self):
            log.append(f"step {self.iter}")
            if self.iter == stop_at:
                raise ArithmeticError("broken off")
            self.storage.put_scalar("loss", self.iter**2)
            self.optimizer.step()

    trainer = Trainer()
    trainer.register_hooks(hooks)
    if end:
        with suppress(ArithmeticError):
            trainer.train(start, end)
    return trainer


_EVENTS = ("before_train", "after_train", "before_step", "after_step")


def _telling_hook(provider, log: list):
    class Telling(provider.HookBase):
        seen = 0

        def tell(self, event: str):
            self.seen += event == "after_step"
            log.append(f"{event} {self.trainer.iter} {self.trainer.storage.iter}")

        def state_dict(self):
            return {"seen": self.seen}

        def load_state_dict(self, state):
            self.seen = state["seen"]

    for event in _EVENTS:
        setattr(Telling, event, partialmethod(Telling.tell, event))
    return Telling()


def observe_TrainerBase(provider):
    log, broken_log = [], []
    hooks = [_telling_hook(provider, log), None, provider.HookBase(), _telling_hook(provider, log)]
    trainer = _train(provider, hooks, 2, 5, log=log)
    state = trainer.state_dict()
    other_hook = _telling_hook(provider, [])
    other = _train(provider, [other_hook])
    other.load_state_dict({**state, "hooks": {**state["hooks"], "Unknown": {"a": 1}}})
    broken = _train(provider, [_telling_hook(provider, broken_log)], 0, 3, stop_at=1)
    seen = {"log": log, "state": {"iteration": state["iteration"], "hooks": [*state["hooks"].values()]}}
    seen |= {"key ends with the class": [key.rsplit(".", 1)[-1] for key in state["hooks"]]}
    bounds = [trainer.start_iter, trainer.max_iter, trainer.iter]
    seen |= {"loaded": [other.iter, other_hook.seen], "bounds": bounds, "broken": [broken_log, broken.iter]}
    return {**seen, "no run_step": raised(lambda: provider.TrainerBase().run_step())}


def observe_HookBase(provider):
    hook = provider.HookBase()
    return [hook.trainer, hook.state_dict(), *(getattr(hook, event)() for event in _EVENTS)]


def observe_IterationTimer(provider):
    trainer = _train(provider, [provider.IterationTimer(warmup_iter=2)], 3, 8)
    values = trainer.storage.history("time").values()
    return [[iteration for _, iteration in values], all(0 < seconds < 5 for seconds, _ in values)]


def observe_LRScheduler(provider):
    cfg = provider.get_cfg()
    cfg.merge_from_list(["SOLVER.MAX_ITER", 10, "SOLVER.WARMUP_ITERS", 4, "SOLVER.STEPS", (8,)])
    first, second = (_train(provider, [provider.LRScheduler()]) for _ in range(2))
    for trainer in (first, second):
        trainer.scheduler = provider.build_lr_scheduler(cfg, trainer.optimizer)
    first.train(0, 6)
    second.load_state_dict(first.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.train(6, 10)
    best = provider.LRScheduler.get_best_param_group_id
    group = [best(_optimizer((1.0, 2.0, 2.0), sizes)) for sizes in ((1, 1, 1), (1, 3, 3), (2, 1, 1))]
    rates = [trainer.storage.history("lr").values() for trainer in (first, second)]
    return {"lr": rates, "state": first.state_dict(), "group": group}


def observe_PeriodicWriter(provider):
    log = []

    class Writer(provider.JSONWriter):
        def write(self):
            log.append(provider.get_event_storage().iter)

        def close(self):
            log.append("close")
            super().close()

    _train(provider, [provider.PeriodicWriter([Writer(os.devnull)], period=3)], 0, 8)
    return [log]


def observe_EvalHook(provider):
    def run(max_iter, period, stop_at=None):
        calls = []

        def evaluate():
            calls.append(provider.get_event_storage().iter)
            return {"bbox/AP": len(calls), "bbox/AP50": torch.tensor(0.5), "loss_val": 1}

        return calls, _train(provider, [provider.EvalHook(period, evaluate)], 0, max_iter, stop_at).storage

    calls, storage = run(6, 2)
    latest = {name: value for name, value in storage.latest().items() if name != "loss"}
    at_end, broken_off = run(4, 0)[0], run(4, 0, stop_at=2)[0]
    return {"calls": calls, "latest": latest, "only at the end": at_end, "broken off": broken_off}


def observe_EventStorage(provider):
    storage = provider.EventStorage(5)
    with storage:
        storage.put_scalar("loss", 4)
        storage.put_scalars(a=1, b=2.0, smoothing_hint=False)
        for value in (3.0, 8.0, 1.0):
            storage.iter += 1
            storage.put_scalar("loss", torch.tensor(value))
        storage.put_scalar("loss", 6.0, cur_iter=30)
        storage.put_scalar("d", 1.0)
    smoothed, window = (storage.latest_with_smoothing_hint(size) for size in (20, 100))
    seen = {"iter": storage.iter, "latest": dict(storage.latest()), "smoothed": smoothed, "window": window}
    seen |= {"history": storage.history("loss").values(), "names": sorted(storage.histories())}
    return {**seen, "unknown": raised(lambda: storage.history("other"))}


def observe_get_event_storage(provider):
    with provider.EventStorage(3) as outer:
        with provider.EventStorage() as inner:
            nested = provider.get_event_storage() is inner
        after = provider.get_event_storage() is outer
    return [nested, after, raised(provider.get_event_storage)]


def _write_scalars(provider, writer) -> None:
    with provider.EventStorage() as storage:
        for iteration in range(6):
            storage.iter = iteration
            storage.put_scalar("loss", float(iteration**2))
            if iteration % 2:
                storage.put_scalar("bbox/AP", iteration * 10.0, smoothing_hint=False)
            if iteration in (2, 3):
                writer.write()
        storage.put_scalar("late", 1.0, cur_iter=9)
        writer.write()
        writer.write()
    writer.close()


def observe_JSONWriter(provider):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "metrics.json")
        for _ in range(2):  # appends
            _write_scalars(provider, provider.JSONWriter(path, window_size=3))
        with open(path) as file:
            return {"text": file.read()}


def observe_TensorboardXWriter(provider):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tempfile.TemporaryDirectory() as folder:
        log_dir = os.path.join(folder, "events")
        writer = provider.TensorboardXWriter(log_dir, window_size=3)
        made_early = os.path.exists(log_dir)
        _write_scalars(provider, writer)
        events = EventAccumulator(log_dir)
        events.Reload()
        values = {tag: [[e.step, e.value] for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return {"values": values, "made early": made_early}


def observe_default_argument_parser(provider):
    parser = provider.default_argument_parser()
    command = ["--config-file", "a.yaml", "--resume", "--eval-only", "--num-gpus", "2", "--machine-rank", "1"]
    some = vars(parser.parse_args([*command, "SEED", "1", "MODEL.WEIGHTS", "x"]))
    none = vars(parser.parse_args([]))
    # A number derived from the user id: the form is what counts.
    return [{**args, "dist_url": args["dist_url"].rsplit(":", 1)[0]} for args in (some, none)]
