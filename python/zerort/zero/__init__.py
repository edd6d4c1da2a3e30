"""DeepSpeed's public names of stage 3."""

from zerort.config.offload import OffloadDeviceEnum, OffloadStateTypeEnum
from zerort.params.sharded import ZeroParamStatus
from zerort.zero.compatible import register_external_parameter, unregister_external_parameter
from zerort.zero.estimates import (
    estimate_zero2_model_states_mem_needs_all_cold,
    estimate_zero2_model_states_mem_needs_all_live,
    estimate_zero3_model_states_mem_needs_all_cold,
    estimate_zero3_model_states_mem_needs_all_live,
)
from zerort.zero.gathered import GatheredParameters, unwrap_model_for_generation
from zerort.zero.init import Init

__all__ = [
    "GatheredParameters",
    "Init",
    "OffloadDeviceEnum",
    "OffloadStateTypeEnum",
    "ZeroParamStatus",
    "estimate_zero2_model_states_mem_needs_all_cold",
    "estimate_zero2_model_states_mem_needs_all_live",
    "estimate_zero3_model_states_mem_needs_all_cold",
    "estimate_zero3_model_states_mem_needs_all_live",
    "register_external_parameter",
    "unregister_external_parameter",
    "unwrap_model_for_generation",
]
