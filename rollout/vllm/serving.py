"""Which of vLLM's serving features work in this engine, and what they need. docs/serving.md says it for readers.

The engine's core runs in the process that calls it, and is stepped when there is work. Features that need several
cores in lockstep (everything with data parallelism) therefore cannot run, and vLLM would not always say so: some
options have no effect, others wait for ever."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ALL_TO_ALL = "allgather_reducescatter"  # vLLM's own choice


def drafts_from_policy(engine_args: Mapping[str, Any]) -> bool:
    """Whether drafts come from the policy's own layers of multi-token prediction, so that weight updates must bring
    those too."""
    speculative = engine_args.get("speculative_config") or {}
    return str(speculative.get("method", "")).endswith("mtp")


def check_serving(
    arguments: Mapping[str, Any], model: Mapping[str, Any], environment: Mapping[str, str], speculates_here: bool = True
) -> None:
    """Raises ValueError for engine arguments that this engine cannot keep its promises with. `model` are the fields of
    config.json; `speculates_here` is False where vLLM's own build computes drafts wrongly."""
    wrong = [*_data_parallel(arguments, environment), *_experts(arguments)]
    if arguments.get("speculative_config"):
        wrong += _speculation(arguments["speculative_config"], model, speculates_here)
    if wrong:
        raise ValueError("engine_args: " + "; ".join(wrong))


def _data_parallel(arguments: Mapping[str, Any], environment: Mapping[str, str]):
    size = max(int(arguments.get("data_parallel_size") or 1), int(environment.get("VLLM_DP_SIZE") or 1))
    if size > 1:
        yield (
            f"data_parallel_size is {size}, and data-parallel attention needs {size} engine cores that step together, "
            "while this engine has one and steps it when there is work: use rollout.workers for more engines, "
            "tensor_parallel_size with enable_expert_parallel for larger ones"
        )
        return
    if arguments.get("enable_dbo") or int(arguments.get("ubatch_size") or 0) > 1:
        yield (
            "enable_dbo (ubatch_size) overlaps the all-to-all of data-parallel engines with computation and does "
            "nothing without data_parallel_size above 1, which this engine cannot have: leave it out"
        )
    if (backend := arguments.get("all2all_backend") or ALL_TO_ALL) != ALL_TO_ALL:
        yield (
            f"all2all_backend {backend} moves tokens between data-parallel engines and does nothing without "
            "data_parallel_size above 1, which this engine cannot have: leave it out"
        )
    if arguments.get("enable_elastic_ep"):
        yield "enable_elastic_ep changes the number of data-parallel engines, which is one here: leave it out"


def _experts(arguments: Mapping[str, Any]):
    balancing = arguments.get("eplb_config") or {}
    if not arguments.get("enable_eplb"):
        if balancing:
            yield "eplb_config without enable_eplb does nothing: set enable_eplb"
        return
    if not arguments.get("enable_expert_parallel") or int(arguments.get("tensor_parallel_size") or 1) < 2:
        yield "enable_eplb spreads experts over GPUs: it needs enable_expert_parallel and tensor_parallel_size above 1"
    if balancing.get("use_async", True):
        yield (
            "enable_eplb moves experts in the background unless told otherwise, and would put old weights over those "
            "of an update: set eplb_config.use_async to false"
        )


def _speculation(speculative: Mapping[str, Any], model: Mapping[str, Any], speculates_here: bool):
    method = speculative.get("method")
    if not speculates_here:
        yield (
            "speculative_config: vLLM's CPU build gets the log-probabilities of speculative decoding wrong without an "
            "error: leave it out on a CPU"
        )
    if str(method).endswith("mtp") and not model.get("num_nextn_predict_layers"):
        yield (
            f"speculative_config.method {method} drafts with layers of multi-token prediction, and this model has none "
            "(num_nextn_predict_layers in its config.json)"
        )
    if speculative.get("rejection_sample_method") == "synthetic":
        yield (
            "speculative_config.rejection_sample_method synthetic accepts drafts by chance: what it writes is not "
            "drawn from the policy"
        )


def reset_expert_placement(runner: Any) -> None:
    """After a reload every expert lies where it lay at the start; says so to the load balancing, which may have moved
    some since. Its figures of load start anew."""
    state = getattr(runner, "eplb_state", None)
    if state is None:
        return
    import torch
    from vllm.distributed.eplb.eplb_state import _commit_eplb_maps

    for placed in state.model_states.values():
        model, known = placed.model, placed.physical_to_logical_map
        counts = model.num_routed_experts, model.num_redundant_experts
        first = state.build_initial_global_physical_to_logical_map(*counts)
        _commit_eplb_maps(placed, torch.tensor(first, dtype=known.dtype).expand(len(known), -1).contiguous())
        placed.expert_load_pass.zero_()
        placed.expert_load_window.zero_()
