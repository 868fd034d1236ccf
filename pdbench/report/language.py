"""The reports' words in English and Chinese. `say(key, language)`; a key without an entry is its own word.

Try: pdbench report single_results disaggregated_results --lang zh
"""

WORDS: dict[str, tuple[str, str]] = {
    "ttft_ms": ("TTFT", "首 token 时间 (TTFT)"),
    "tbt_ms": ("TBT", "token 间隔 (TBT)"),
    "e2e_ms": ("E2E", "端到端 (E2E)"),
    "client_ms": ("client to proxy", "客户端到代理"),
    "queue_ms": ("queue", "排队"),
    "prefill_ms": ("prefill", "预填充"),
    "kv_transfer_ms": ("KV transfer", "KV 传输"),
    "decode_ms": ("decode", "解码"),
    "requests": ("requests succeeded / sent", "成功 / 发送的请求"),
    "output_tokens_per_s": ("output tokens/s", "输出 token/秒"),
    "j_per_output_token": ("J per output token", "每输出 token 能耗 (J)"),
    "milliseconds": ("milliseconds", "毫秒"),
    "mean": ("mean", "均值"),
    "device": ("device", "设备"),
    "devices": ("Devices over the measured windows", "测量窗口内的设备"),
    "role": ("role", "角色"),
    "power_w": ("power, W", "功率 (W)"),
    "utilization": ("use, %", "利用率 (%)"),
    "clock_mhz": ("clock, MHz", "频率 (MHz)"),
    "temperature": ("°C", "°C"),
    "energy_j": ("energy, J", "能量 (J)"),
    "metric": ("metric", "指标"),
    "verdict": ("verdict", "结论"),
    "change": ("change, 95 % interval", "变化，95 % 区间"),
    "against": ("{b} against {a}", "{b} 对比 {a}"),
    "better": ("better", "更好"),
    "worse": ("worse", "更差"),
    "same": ("same", "相同"),
    "unclear": ("unclear", "不确定"),
    "unjudged": ("not judged", "未判定"),
    "differs": ("differs:", "不同："),
    "not measured": ("not measured", "未测量"),
    "run": ("run", "运行"),
    "model": ("model", "模型"),
    "side by side": ("Side by side", "并列比较"),
    "ttft_p50_ms": ("TTFT p50, ms", "TTFT p50 (ms)"),
    "ttft_p99_ms": ("TTFT p99, ms", "TTFT p99 (ms)"),
    "tbt_p50_ms": ("TBT p50, ms", "TBT p50 (ms)"),
    "tbt_p99_ms": ("TBT p99, ms", "TBT p99 (ms)"),
    "e2e_p50_ms": ("E2E p50, ms", "E2E p50 (ms)"),
}


def say(key: str, language: str = "en") -> str:
    """The word for `key` in `language` ("en" or "zh")."""
    pair = WORDS.get(key)
    return key if pair is None else pair[1 if language == "zh" else 0]
