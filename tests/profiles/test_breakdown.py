from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from exporter.errors import EngineError
from profiles.breakdown import classify, read_breakdown


@pytest.mark.parametrize(
    ("name", "op_type", "kind"),
    [
        ("/model/layers.3/self_attn/scores/MatMul", "MatMul", "attention"),
        ("/model/layers.3/self_attn/scores/MatMul", "FusedMatMul", "attention"),
        ("/model/layers.3/self_attn/weights/Softmax", "Softmax", "attention"),
        ("/model/layers.3/self_attn/cache/key/TensorScatter", "TensorScatter", "attention"),
        ("/model/layers.3/self_attn/RotaryEmbedding", "RotaryEmbedding", "attention"),
        ("/model/layers.3/self_attn/q_proj/Gemm", "Gemm", "matmul"),
        ("/model/layers.3/self_attn/o_proj/MatMul", "MatMulNBits", "matmul"),
        ("/model/layers.3/mlp/gate_proj/Gemm", "Gemm", "matmul"),
        ("/model/layers.3/mlp/Mul", "Mul", "other"),
        ("/model/layers.3/post_attention_layernorm/RMSNormalization", "RMSNormalization", "other"),
        ("/model/Gemm", "Gemm", "matmul"),
        ("fused 7", "GroupQueryAttention", "attention"),
        ("/model/embed_tokens/Gather", "Gather", "other"),
    ],
)
def test_classes(name, op_type, kind):
    assert classify(name, op_type) == kind


def event(name, start, duration, op=None):
    return {"ph": "X", "name": name, "ts": start, "dur": duration, "args": {"op_name": op} if op else {}}


def test_medians_of_the_last_calls(tmp_path):
    events = [{"ph": "M", "name": "meta"}]
    for call in range(4):  # the first is a prefill of another length, in the third something else ran
        at, more = 1000 * call, 500 if call == 2 else 0
        events += [
            event("/model/layers.0/self_attn/q_proj/Gemm_kernel_time", at + 10, 900 if call == 0 else 40, "Gemm"),
            event("/model/layers.0/self_attn/scores/MatMul_kernel_time", at + 50, 20 + more, "MatMul"),
            event("/model/layers.0/self_attn/weights/Softmax_kernel_time", at + 70 + more, 10, "Softmax"),
            event("/model/norm/RMSNormalization_kernel_time", at + 80 + more, 10, "RMSNormalization"),
            event("model_run", at, 950 if call == 0 else 100 + more),
        ]
    path = tmp_path / "p.json"
    path.write_text(json.dumps(events))
    found = read_breakdown(path, runs=3)
    assert found == pytest.approx({"attention": 30e-6, "matmul": 40e-6, "other": 10e-6, "runtime": 20e-6})
    with pytest.raises(EngineError, match="holds 4 calls, 5 are needed"):
        read_breakdown(path, runs=5)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"ph": "X"}]', '[{"ph":"X","name":"model_run","ts":"a","dur":1}]', "3"])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(EngineError):
        read_breakdown(path, runs=1)


def test_a_profile_of_the_real_runtime(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="/model/layers.0/mlp/up_proj/MatMul"),
        helper.make_node("Softmax", ["h"], ["y"], name="/model/layers.0/self_attn/weights/Softmax"),
    ]
    x, w, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [256, 256]) for n in "xwy")
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x, w], [y]), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = 1, True
    options.profile_file_prefix = str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    value = np.ones((256, 256), np.float32)
    for _ in range(5):
        session.run(None, {"x": value, "w": value})
    path = session.end_profiling()
    found = read_breakdown(tmp_path / path, runs=3)
    assert found["matmul"] > 0
    assert found["attention"] > 0
    assert found["other"] == 0
    assert sum(found.values()) < 1
