from tests.rollout.conftest import vllm_process as vllm_process
