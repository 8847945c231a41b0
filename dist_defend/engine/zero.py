"""DeepSpeed's ZeRO: optimizer state (1), gradients too (2), and parameters too (3) sharded over the ranks.

Rajbhandari et al. 2020, arXiv 1910.02054. DeepSpeed is driven without Accelerate's wrapper, which cannot use CPU ranks.
"""

import logging
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dist_defend.engine.objective import NonFiniteError, Strategy
from dist_defend.engine.optim import build_optimizer
from dist_defend.engine.sharding import check_optimizer
from dist_defend.engine.whole import Whole


class Zero(Strategy):
    """As FullySharded, through a DeepSpeed engine; a state holds whole tensors, so any strategy can go on from it."""

    def __post_init__(self) -> None:
        check_optimizer(self.ranks.sharding.strategy, self.options.optimizer.name)
        self.is_partitioned = self.ranks.sharding.strategy == "zero3"
        self._whole: Whole | None = None  # until the first update

    def _shard(self) -> None:
        is_cpu = self.ranks.device.type == "cpu"
        if is_cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed  # seconds of import, and an extra

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        if is_cpu:
            # A shared-memory all-reduce that DeepSpeed would compile now, for minutes; gloo does without.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._whole = Whole(self.objective)
        autocast = self.ranks.accelerator.autocast
        plain_forward = self.objective.forward

        def forward(batch: Any) -> dict[str, Tensor]:
            with autocast():  # inside of the engine, which switches off any around it
                terms: dict[str, Tensor] = plain_forward(batch)
                return terms

        self.objective.forward = forward
        self.parameters = [p for p in self.objective.parameters() if p.requires_grad]
        self.engine, *_ = deepspeed.initialize(
            model=self.objective,
            optimizer=build_optimizer(self.parameters, self.options.optimizer),
            config={
                **self.ranks.sharding.deepspeed,
                "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own log; the loader decides
                "gradient_accumulation_steps": self.options.accumulation,
                "gradient_clipping": self.options.max_grad_norm or 0.0,
                "zero_allow_untested_optimizer": True,  # SGD: element by element, like those that were tested
                "zero_force_ds_cpu_optimizer": False,
                "steps_per_print": 1 << 60,
            },
            dist_init_required=False,
        )
        self.zero = self.engine.optimizer
        self.optimizer = self.zero.optimizer

    def forward(self, batch: Any) -> dict[str, Tensor]:
        if self._whole is None:
            self._shard()
        terms: dict[str, Tensor] = self.engine(batch)
        return terms

    def forward_backward(self, batch: Any, is_last: bool) -> dict[str, Tensor]:
        if self._whole is None:
            self._shard()
        self.engine.set_gradient_accumulation_boundary(is_last)
        terms = self.forward(batch)
        self.engine.backward(terms["loss"])  # divides by the number of micro-batches
        return terms

    def update(self, lr: float) -> dict[str, Tensor]:
        for group in self.zero.param_groups:
            group["lr"] = lr
        self.engine.step()
        norm = torch.as_tensor(float(self.engine.get_global_grad_norm()), device=self.ranks.device)
        if not torch.isfinite(norm) or norm < 0:  # DeepSpeed says -1 for a norm that is none
            raise NonFiniteError("the gradient is not finite")
        return {"grad_norm": norm}

    def plain(self) -> AbstractContextManager[None]:
        if self._whole is None or not self.is_partitioned:
            return nullcontext()
        return self._whole.with_parameters(self._full_parameters())

    def _full_parameters(self) -> dict[str, Tensor]:
        from deepspeed import zero

        full = {}
        for name, parameter in self.objective.named_parameters():
            with zero.GatheredParameters([parameter]):
                full[name] = parameter.detach().clone()
        return full

    def state_dict(self) -> dict[str, Any]:
        with self.plain():
            objective = {key: value.clone() for key, value in self.objective.state_dict().items()}
        if self._whole is None:
            return {"objective": objective, "optimizer": None}
        from deepspeed.utils import safe_get_full_optimizer_state

        flat = next(iter(self._flat()))
        kinds = {key: value.ndim > 0 for key, value in self.optimizer.state.get(flat, {}).items()}
        states: dict[int, dict[str, Any]] = {
            number: {
                key: safe_get_full_optimizer_state(parameter, key).clone()
                if is_elementwise
                else self.optimizer.state[flat][key].clone()
                for key, is_elementwise in kinds.items()
            }
            for number, parameter in enumerate(self.parameters if kinds else [])
        }
        group = {key: value for key, value in self.zero.param_groups[0].items() if key != "params"}
        groups = [{**group, "params": list(range(len(self.parameters)))}]
        return {"objective": objective, "optimizer": {"state": states, "param_groups": groups}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.objective.load_state_dict(state["objective"])
        if state["optimizer"] is None:
            return
        self._shard()
        states = state["optimizer"]["state"]
        if not states:
            return
        for flat in self._flat():
            self.optimizer.state[flat] = {
                key: torch.zeros_like(flat.data) if value.ndim else value.to(flat.device).clone()
                for key, value in states[0].items()
            }
        if not self.is_partitioned:
            self.zero._lazy_init_hp_params_optimizer_state()
        for number, parameter in enumerate(self.parameters):
            for key, value in states[number].items():
                if value.ndim:
                    self._set_state(parameter, key, value.to(self.ranks.device))

    def _set_state(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        if not self.is_partitioned:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        own, _ = self.zero._get_fp32_opt_state_partition(parameter, False, key)  # DeepSpeed's setter forgets padding
        padded = nn.functional.pad(value.flatten(), [0, len(own) * self.ranks.world_size - value.numel()])
        own.copy_(padded.chunk(self.ranks.world_size)[self.ranks.rank])

    def _flat(self) -> Iterable[Tensor]:
        """This rank's flat partitions, which are what DeepSpeed's optimizer updates."""
        name = "fp32_partitioned_groups_flat" if self.is_partitioned else "single_partition_of_fp32_groups"
        flat: Iterable[Tensor] = getattr(self.zero, name)
        return flat
