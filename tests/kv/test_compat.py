"""What the connector supports: vLLM's versions, deployments, KV caches, and its own options."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import SupportsHMA
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    RSWASpec,
    SlidingWindowSpec,
)

from pdbench.kv import compat
from pdbench.kv.compat import Options, UnsupportedError
from pdbench.kv.groups import Group

BLOCK = 16


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0.0", "0.9.2", "dev"])
def test_vllm_outside_the_range_is_refused(version, monkeypatch):
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(UnsupportedError, match=r"0\.26 to 0\.33"):
        compat.check_version()


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0", "0.33.1rc1+cpu", "0.30.0.dev3"])
def test_vllm_in_the_range_is_accepted(version, monkeypatch):
    compat.check_version()
    monkeypatch.setattr(vllm, "__version__", version)
    compat.check_version()


def deployment_of(specs, sleep=False, drafting=None, **parallel):
    """vLLM's configuration and KV cache configuration, as far as the connector reads them; the groups' specs are vLLM's own."""
    model = SimpleNamespace(enable_sleep_mode=sleep, get_total_num_hidden_layers=lambda: 1)
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel), model_config=model, speculative_config=drafting
    )
    groups = [KVCacheGroupSpec([f"model.layers.{index}.attn"], spec) for index, spec in enumerate(specs)]
    return config, SimpleNamespace(kv_cache_groups=groups)


SIZES = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 64, "dtype": torch.float16}
FULL, WINDOW = FullAttentionSpec(**SIZES), SlidingWindowSpec(**SIZES, sliding_window=64)
CHUNKS = ChunkedLocalAttentionSpec(**SIZES, attention_chunk_size=64)
MAMBA = MambaSpec(block_size=BLOCK, shapes=((1, 1),), dtypes=(torch.float16,))


@pytest.mark.parametrize("spec", [FULL, MLAAttentionSpec(**SIZES), FullAttentionSpec(**SIZES, sliding_window=64)])
def test_full_attention_is_accepted(spec):
    config, caches = deployment_of([spec], pipeline_parallel_size=1)
    compat.check_deployment(config, caches)
    assert compat.groups(caches) == [Group(BLOCK)]


@pytest.mark.skipif(
    tuple(int(part) for part in vllm.__version__.split(".")[:2]) < compat.HYBRID, reason="vLLM makes one group"
)
@pytest.mark.parametrize("specs", [[FULL, WINDOW], [WINDOW], [FULL, WINDOW, WINDOW]])
def test_sliding_windows_are_accepted_and_kept_one_token_longer(specs):
    """vLLM keeps what the next token sees; decode computes the prompt's last token, which sees one more."""
    config, caches = deployment_of(specs)
    compat.check_deployment(config, caches)
    expected = [Group(BLOCK, 64 if spec is WINDOW else 0) for spec in specs]
    assert compat.groups(caches) == expected
    compat.keep_whole_windows(caches)
    kept = [getattr(group.kv_cache_spec, "extra_retained_tokens", None) for group in caches.kv_cache_groups]
    assert kept == [1 if spec is WINDOW else None for spec in specs] and compat.groups(caches) == expected


@pytest.mark.parametrize(
    ("specs", "more", "message"),
    [
        ([], {}, "no KV cache"),
        ([FULL, CHUNKS], {}, "ChunkedLocalAttentionSpec"),
        ([RSWASpec(**SIZES, rswa_window=64)], {}, "RSWASpec"),  # a FullAttentionSpec whose blocks are evicted
        ([FULL, MAMBA], {}, "MambaSpec"),
        ([FULL], {"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2"),
        ([FULL], {"data_parallel_size": 4}, "--data-parallel-size 4"),
        ([FULL], {"decode_context_parallel_size": 2}, "--decode-context-parallel-size 2"),
        ([FULL], {"sleep": True}, "--enable-sleep-mode"),
        ([FULL, FULL], {"drafting": True}, "--disable-hybrid-kv-cache-manager"),
    ],
)
def test_unsupported_deployment_is_refused_by_name(specs, more, message):
    with pytest.raises(UnsupportedError, match=message):
        compat.check_deployment(*deployment_of(specs, **more))


@pytest.mark.parametrize(
    "draft", ["model.layers.4.self_attn.attn", "model.layers.4.mtp_block.self_attn.attn", "mtp.layers.0.self_attn.attn",
              "draft_model.model.layers.0.self_attn.attn"],
)  # fmt: skip
def test_draft_models_layers_are_recognised(draft):
    names = [f"model.layers.{i}.self_attn.attn" for i in range(4)]
    model = SimpleNamespace(get_total_num_hidden_layers=lambda: 4)
    drafting = SimpleNamespace(speculative_config=object(), model_config=model)
    assert compat.draft_layers(drafting, [*names, draft]) == {draft}
    assert not compat.draft_layers(SimpleNamespace(speculative_config=None), [*names, draft])


@pytest.mark.parametrize(
    ("parallel", "transfer", "drafting", "groups", "message"),
    [
        ({"tensor_parallel_size": 2}, {}, None, [Group(16)], "--tensor-parallel-size 2"),
        ({"distributed_executor_backend": "mp"}, {}, None, [Group(16)], "--distributed-executor-backend mp"),
        ({}, {}, object(), [Group(16)], "speculative decoding"),
        ({}, {}, None, [Group(16), Group(16, 64)], "sliding windows"),
        ({}, {}, None, [Group(16, 64)], "sliding windows"),
        ({}, {"kv_load_failure_policy": "fail"}, None, [Group(16)], 'kv_load_failure_policy "fail" on prefill'),
    ],
)
def test_return_of_kv_is_refused_where_it_does_not_hold(parallel, transfer, drafting, groups, message):
    whole = {"tensor_parallel_size": 1, "distributed_executor_backend": "uni"}
    role = {"is_kv_producer": True, "kv_load_failure_policy": "recompute"}

    def config(parallel, transfer, drafting):
        return SimpleNamespace(
            parallel_config=SimpleNamespace(**whole | parallel),
            kv_transfer_config=SimpleNamespace(**role | transfer),
            speculative_config=drafting,
        )

    compat.check_return_kv(config({}, {}, None), [Group(16)])
    with pytest.raises(UnsupportedError, match=re.escape(message)) as refusal:
        compat.check_return_kv(config(parallel, transfer, drafting), groups)
    assert "\n" not in str(refusal.value)


def test_vllm_whose_groups_are_not_moved_makes_one(monkeypatch):
    """Then vLLM keeps windows beside full attention whole, and has none for the connector but a model's that has nothing else."""
    monkeypatch.setattr(vllm, "__version__", "0.31.0")
    assert not issubclass(compat.hybrid_base(), SupportsHMA)
    with pytest.raises(UnsupportedError, match=r"vLLM 0\.32 and newer.* SlidingWindowSpec"):
        compat.check_deployment(*deployment_of([WINDOW]))


def test_range_is_readable_without_vllm():
    """pdbench.serving chooses a connector by it, on hosts that may have no vLLM."""
    code = "import sys, pdbench.kv.compat; assert not {'vllm', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def options_of(extra, **transfer):
    config = SimpleNamespace(kv_port=14579, kv_connector_extra_config=extra, **transfer)
    return Options.of(SimpleNamespace(kv_transfer_config=config))


@pytest.mark.parametrize("extra", [{}, {"kv_ip": "10.0.0.1"}])
def test_kv_ip_stands_in_the_extra_configuration_or_beside_it(extra):
    assert options_of(extra, kv_ip="10.0.0.1") == Options(kv_ip="10.0.0.1", port=14579)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"transprt": "tcp"}, "unknown field `transprt`; the options are kv_ip, transport,"),
        ({"transport": "rdma"}, "'rdma' - at `\\$.transport`"),
        ({"transfer_timeout_s": 0}, "transfer_timeout_s"),
        ({"staging_mib": 0}, "staging_mib"),
        ({"port": 1}, "kv_port"),
    ],
)
def test_options_that_cannot_work_are_refused(extra, message):
    with pytest.raises(UnsupportedError, match=message):
        options_of(extra)


@pytest.mark.parametrize("secret", ["", "short"])
def test_missing_secret_is_refused_with_the_remedy(monkeypatch, secret):
    monkeypatch.setenv(compat.SECRET_VARIABLE, secret)
    with pytest.raises(UnsupportedError, match="openssl rand"):
        compat.shared_secret()
