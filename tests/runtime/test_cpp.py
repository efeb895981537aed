"""The programs of runtime/, run: kernels against double precision, sessions, the cost of a step, examples, the package."""

from __future__ import annotations

import ctypes as c
import dataclasses
import json
import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import cgroups
import fake_engines
import hf
import numpy as np
import pytest
from building import REPOSITORY, lacking, run
from capi import BUNDLE, Api, ModelInfo, RuntimeFailure, SessionOptions, listing

from exporter.bundle import Bundle
from exporter.checkpoint import open_checkpoint
from exporter.cli import _run
from exporter.engines import open_session
from exporter.engines.cores import physical_cores
from exporter.export import ExportOptions, export
from exporter.generate import generate
from profiles.benchmarks import runtime as benchmark
from profiles.machine import fingerprint
from profiles.results import Results

PROMPT = [5, 17, 33, 2, 40]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("programs")
    options = ExportOptions(patterns=("grouped", "fused", "attention", "gqa"), groups=(2, 1), cache="static")
    return export(open_checkpoint(hf.save("llama", folder)), folder / "bundle", options)


@pytest.fixture(scope="module")
def greedy(bundle: Bundle) -> list[int]:
    with open_session(bundle, "g2.grouped", threads=1) as session:
        return [int(tokens[0]) for tokens in generate(session, [np.array(PROMPT)], 12)]


def test_kernels(built: Path, tools: dict[str, str]) -> None:
    output = run(tools["ctest"], "--test-dir", built, "--output-on-failure")
    assert "100% tests passed" in output
    assert "no_shared_symbols_plain" in output


def test_sessions_as_an_application_uses_them(built: Path, bundle: Bundle) -> None:
    output = run(built / "tests/sessions", bundle.path)
    assert output.splitlines() == [f"{variant.name} is sound" for variant in bundle.variants]


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("variant", ["g2.grouped", "g1.attention", "g2.gqa", "g2.fused"])
def test_a_step_allocates_only_what_onnx_runtime_does(variant: str, batch: int, built: Path, bundle: Bundle) -> None:
    cost = json.loads(run(built / "tests/step", bundle.path, variant, batch))
    assert cost["steps"] > 2000
    assert cost["own_allocations"] == 0
    # One more a step would be `steps` more. ONNX Runtime's own are not always the same: once there was one more in 884,500.
    assert abs(cost["step_allocations"] - cost["run_allocations"]) < cost["steps"] / 100
    assert cost["run_allocations"] > 0


def test_what_the_benchmark_says_a_session_adds(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a tiny form. Times are not tested, but that each is a part of what it has to be a part of."""
    monkeypatch.setattr(benchmark, "TINY_FORMS", {"static": ("fused", "gqa"), "concat": ("grouped",)})
    config = tmp_path / "deeper.json"
    config.write_text(json.dumps({**benchmark.TINY, "num_hidden_layers": 3, "max_position_embeddings": 200}))
    rows = list(benchmark.added(built, str(config), tmp_path, turns=1))
    assert [(row["variant"], row["cache"], row["layers"], row["batch"]) for row in rows] == [
        *((f"tiny {pattern}", "static", 2, batch) for pattern in ("fused", "gqa") for batch in (1, 4)),
        *(("tiny grouped", "concat", 2, batch) for batch in (1, 4)),
        ("fused", "static", 3, 1),
        ("grouped", "concat", 3, 1),
    ]
    for row in rows:
        (cost,) = row["turns"]
        for grown in (cost["grown"], cost["chosen"]):
            assert (grown["from"], grown["to"]) == (64, 1100 if row["layers"] == 2 else 200)
            assert 0 < grown["beside_mean_us"] < grown["beside_largest_us"] <= grown["step_largest_us"]
        assert (cost["chosen"]["bound"] == 0) == (row["pattern"] == "fused"), "bound once"
        assert cost["grown"]["bound"] > 0
        assert ("kept" in row) == ("beside_us" in row) == (row["cache"] == "static")
        if "kept" in row:
            assert 0 < cost["beside_us"] < cost["step_us"]
            over = max(cost["beside_us"], (cost["step_us"] - cost["run_us"]) if row["layers"] == 2 else 0)
            assert row["kept"] == (max(over, cost["chosen"]["beside_mean_us"] if "fused" in row["variant"] else 0) < 20)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx", "onnxruntime-cuda"])
def test_sessions_on_a_fake_gpu(backend: str, built: Path, bundle: Bundle, tmp_path: Path) -> None:
    with_engines = Bundle.open(shutil.copytree(bundle.path, tmp_path / "bundle"))
    variants = [variant for variant in with_engines.variants if variant.pattern in ("grouped", "attention")]
    for variant in variants:
        for batch in (1, 2, 3):
            fake_engines.add(with_engines, variant, backend, batch=batch)
    output = run(built / "tests/sessions_fake", with_engines.path, backend)
    assert output.splitlines() == [f"{variant.name} is sound" for variant in variants]


def test_mutated_files_are_read_or_refused(built: Path, bundle: Bundle, tmp_path: Path) -> None:
    with_engines = Bundle.open(shutil.copytree(bundle.path, tmp_path / "bundle"))
    engines = fake_engines.add(with_engines, with_engines.variants[0], "tensorrt") / "engine.json"
    files = [bundle.path / "headpool.json", bundle.path / "model.g2.fused.onnx", engines]
    assert "3000 mutations" in run(built / "tests/fuzz", 3000, *files)


def test_the_example_generate(built: Path, bundle: Bundle, greedy: list[int]) -> None:
    output = run(built / "examples/generate", bundle.path, "g2.grouped", len(greedy), *PROMPT)
    shown = [int(line) for line in output.splitlines() if line.strip().isdigit()]
    stop = greedy.index(2) + 1 if 2 in greedy else len(greedy)  # eos_token_id
    assert shown == greedy[:stop]


def test_headpool_reads_what_the_example_bench_writes(built: Path, bundle: Bundle, tmp_path: Path, capfd) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        run(built / "examples/bench", bundle.path, "g2.fused", file, "8,16", 16, 1, 2)
    results = Results.load(files[0])
    assert [(cell.kind, cell.context, cell.batch, len(cell.samples)) for cell in results.cells] == [
        (kind, context, 2, count) for context in (8, 16) for kind, count in (("decode", 16), ("prefill", 6), ("ttft", 6))
    ]
    assert results.cells[0].subject.groups == 2
    assert _run(["compare", *map(str, files)]) == 0
    assert "fused" in capfd.readouterr().out
    assert sorted(tmp_path.iterdir()) == files


def test_bench_knows_the_machine_as_profile_does(built: Path, bundle: Bundle, tmp_path: Path) -> None:
    """Whatever number of threads it was given."""
    file = tmp_path / "cpp.json"
    run(built / "examples/bench", bundle.path, "g2.fused", file, 8, 16, 3)
    ours = Results.load(file).machine
    assert dataclasses.replace(ours, load=0.0) == dataclasses.replace(fingerprint(), gpus=(), load=0.0)
    assert Results.load(file).cells[0].options["threads"] == 3


@pytest.mark.parametrize("case", cgroups.CASES)
def test_threads_are_those_that_python_takes(case: str, built: Path, tmp_path: Path) -> None:
    files, cpus = cgroups.CASES[case]
    shared = cgroups.topology(dict.fromkeys(os.sched_getaffinity(0), "0-63"))  # one core
    for siblings in ({}, shared):
        cgroups.write({**files, **siblings}, tmp_path)
        assert run(built / "tests/cores", tmp_path).split() == [str(physical_cores(tmp_path)), str(cpus)]
    assert physical_cores(tmp_path) == 1


@pytest.mark.parametrize("cache", ["fp16", "int8"])
def test_bench_says_how_caches_are_stored_as_profile_does(cache: str, built: Path, tmp_path: Path) -> None:
    bundle = export(
        open_checkpoint(hf.save("llama", tmp_path)), tmp_path / "bundle", ExportOptions(patterns=("fused",), cache_dtype=cache)
    )
    files = [tmp_path / "cpp.json", tmp_path / "python.json"]
    run(built / "examples/bench", bundle.path, "", files[0], 8, 16, 1)
    words = ["--contexts", "8", "--samples", "16", "--threads", "1", "--out", str(files[1])]
    assert _run(["profile", str(bundle.path), *words]) == 0
    ours, theirs = (Results.load(file).cells[0].subject for file in files)
    assert dataclasses.replace(ours, bundle_hash=theirs.bundle_hash) == theirs
    assert ours.dtype == f"fp32, {cache} cache"


def test_bench_says_how_weights_are_stored_as_profile_does(built: Path, tmp_path: Path, capfd) -> None:
    """So that compare takes an int4 bundle's cells of both together, and those of an fp32 one not."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    hf.build("llama", sizes).save_pretrained(tmp_path / "model")
    export(open_checkpoint(tmp_path / "model"), tmp_path / "int4", ExportOptions(patterns=("grouped",), quantize="int4"))
    manifest = Path(shutil.copytree(tmp_path / "int4", tmp_path / "plain")) / "headpool.json"
    manifest.write_text(manifest.read_text().replace('"quantize": "int4"', '"quantize": null'))
    files = {name: tmp_path / f"{name}.json" for name in ("plain", "int4")}
    for name, file in files.items():
        run(built / "examples/bench", tmp_path / name, "", file, 8, 16, 1)
    python = tmp_path / "python.json"
    words = ["--contexts", "8", "--samples", "16", "--threads", "1", "--out", str(python)]
    assert _run(["profile", str(tmp_path / "int4"), *words]) == 0
    ours, theirs = (Results.load(file).cells[0].subject for file in (files["int4"], python))
    assert dataclasses.replace(ours, bundle_hash=theirs.bundle_hash) == theirs
    assert ours.dtype == "fp32, int4 weights"
    assert _run(["compare", str(files["int4"]), str(python)]) == 0
    assert _run(["compare", str(files["plain"]), str(python)]) == 2
    assert "no cell in common" in capfd.readouterr().err


def test_the_examples_on_a_backend(built: Path, bundle: Bundle, greedy: list[int], tmp_path: Path, capfd) -> None:
    with_engines = Bundle.open(shutil.copytree(bundle.path, tmp_path / "bundle"))
    fake_engines.add(with_engines, with_engines.variant("g2.grouped"), "tensorrt-rtx")
    output = run(
        built / "tests/generate_fake", "--backend", "tensorrt-rtx", with_engines.path, "g2.grouped", len(greedy), *PROMPT
    )
    shown = [int(line) for line in output.splitlines() if line.strip().isdigit()]
    assert shown == greedy[: len(shown)] != []
    files = {name: tmp_path / f"{name}.json" for name in ("onnxruntime", "onnxruntime-cuda", "tensorrt-rtx")}
    for backend, file in files.items():
        run(built / "tests/bench_fake", "--backend", backend, with_engines.path, "g2.grouped", file, 8, 16, 1)
    results = [Results.load(file) for file in files.values()]
    assert [(r.cells[0].backend, r.cells[0].provider, r.cells[0].versions, r.machine.gpus) for r in results] == [
        ("headpool::runtime onnxruntime", "CPUExecutionProvider", {"onnxruntime": version("onnxruntime")}, ()),
        (
            "headpool::runtime onnxruntime-cuda",
            "CUDAExecutionProvider",
            {"onnxruntime": version("onnxruntime")},
            ("CUDAExecutionProvider",),  # which says no more of its GPU
        ),
        ("headpool::runtime tensorrt-rtx", "NVIDIA Fake (sm89)", {"tensorrt_rtx": "1.2.3.4"}, ("NVIDIA Fake (sm89)",)),
    ]
    assert _run(["compare", str(files["onnxruntime"]), str(files["tensorrt-rtx"])]) == 0
    words = " ".join("".join(capfd.readouterr()).split())
    assert "headpool::runtime tensorrt-rtx NVIDIA Fake (sm89)" in words
    for example, rest in (("generate", (1, 1)), ("bench", (tmp_path / "c.json", 8))):
        done = subprocess.run(
            [built / "examples" / example, "--backend", "cuda", bundle.path, "g2.grouped", *map(str, rest)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert done.stderr.startswith(f"{example}: backend cuda is unknown; choose from onnxruntime, ")


def test_versions(api: Api) -> None:
    assert api.c.hp_abi_version() == 1
    assert api.c.hp_version().decode() == version("headpool")
    assert api.c.hp_onnxruntime_version().decode() == version("onnxruntime")


def test_what_a_bundle_holds(api: Api, bundle: Bundle, tmp_path: Path) -> None:
    """Without opening any of it: what each says once it is open, but for what runs it."""
    listed = api.variants(bundle.path)
    assert [said["variant"] for said in listed] == [variant.name for variant in bundle.variants]
    for said in listed:
        opened = api.open(bundle.path, said["variant"])
        expected = {**listing(opened.info()), "backend": "", "provider": "", "library": "", "library_version": "", "threads": 0}
        assert said == expected
        opened.close()
    with pytest.raises(RuntimeFailure, match="is not a bundle: it has no headpool") as caught:
        api.variants(tmp_path)
    assert caught.value.status == BUNDLE


def test_programs_built_for_an_older_header(api: Api, bundle: Bundle) -> None:
    """Whose structs end sooner: members that they do not have are neither read nor written."""
    model = api.open(bundle.path, "g1.gqa")
    info = ModelInfo(pattern=b"as it was")
    info.size = ModelInfo.pattern.offset
    api.check(api.c.hp_model_get_info(model.handle, c.byref(info)))
    assert (info.variant, info.pattern) == (b"g1.gqa", b"as it was")
    session, options = c.c_void_p(), SessionOptions(batch=3, capacity=-1)
    options.size = SessionOptions.capacity.offset
    api.check(api.c.hp_session_create(model.handle, c.byref(options), c.byref(session)))
    assert api.c.hp_session_batch(session) == 3
    api.c.hp_session_free(session)
    later = (c.c_char * 64)()  # of a newer header, which may set nothing that this library does not know
    c.memmove(later, c.byref(options), c.sizeof(options))
    SessionOptions.from_buffer(later).size, SessionOptions.from_buffer(later).capacity = len(later), 0
    api.check(api.c.hp_session_create(model.handle, c.cast(later, c.POINTER(SessionOptions)), c.byref(session)))
    assert api.c.hp_session_batch(session) == 3
    api.c.hp_session_free(session)
    later[40] = 1
    with pytest.raises(
        RuntimeFailure, match=r"^an hp_session_options sets what headpool [0-9.]+ does not know; link the library"
    ):
        api.check(api.c.hp_session_create(model.handle, c.cast(later, c.POINTER(SessionOptions)), c.byref(session)))
    options.size = 0
    with pytest.raises(
        RuntimeFailure, match=r"^the size in an hp_session_options is 0, not 32; begin it with HP_INIT\(hp_session_options\)$"
    ):
        api.check(api.c.hp_session_create(model.handle, c.byref(options), c.byref(session)))
    model.close()


def test_the_installed_package(built: Path, tools: dict[str, str], bundle: Bundle, greedy: list[int], tmp_path: Path) -> None:
    """A project of its own finds it through CMake, shared and static, in C++ and C; a command line through pkg-config."""
    prefix, consumer = tmp_path / "prefix", tmp_path / "consumer"
    run(tools["cmake"], "--install", built, "--prefix", prefix)
    source = REPOSITORY / "runtime/examples/consumer"
    run(tools["cmake"], "-S", source, "-B", consumer, f"-DCMAKE_PREFIX_PATH={prefix}")  # it knows where ONNX Runtime is
    run(tools["cmake"], "--build", consumer)
    for program in ("consumer", "consumer_static", "consumer_c"):
        assert run(consumer / program, bundle.path, *PROMPT) == f"{greedy[0]}\n"
    in_c = tmp_path / "in_c"
    in_c.mkdir()
    (in_c / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(in_c LANGUAGES C)\nfind_package(headpool REQUIRED)\n"
        f"add_executable(program {source / 'main.c'})\ntarget_link_libraries(program PRIVATE headpool::runtime_static)\n"
    )
    run(tools["cmake"], "-S", in_c, "-B", in_c / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    run(tools["cmake"], "--build", in_c / "build")
    assert run(in_c / "build/program", bundle.path, *PROMPT) == f"{greedy[0]}\n"
    if shutil.which("pkg-config") is None:
        return
    pkgconfig = str(next(prefix.glob("lib*/**/pkgconfig")))
    for library in ("shared", "static"):  # the linker takes the shared one where there are both
        flags = run("pkg-config", f"--{library}", "--cflags", "--libs", "headpool", PKG_CONFIG_PATH=pkgconfig).split()
        run("c++", "-std=c++20", source / "main.cpp", "-o", tmp_path / f"{library}_cpp", *flags)
        run("cc", "-std=c99", source / "main.c", "-o", tmp_path / f"{library}_c", *flags)
        for program in (tmp_path / f"{library}_cpp", tmp_path / f"{library}_c"):
            assert run(program, bundle.path, *PROMPT) == f"{greedy[0]}\n"
            assert subprocess.run([program, bundle.path, "5x"], capture_output=True).returncode == 1
        for file in prefix.glob("lib*/**/libheadpool.so*"):
            file.unlink()


def test_a_package_whose_onnx_runtime_has_gone(built: Path, tools: dict[str, str], tmp_path: Path) -> None:
    """It is found by CMAKE_PREFIX_PATH, else said in one sentence."""
    prefix = tmp_path / "prefix"
    run(tools["cmake"], "--install", built, "--prefix", prefix)
    config = next(prefix.glob("lib*/**/headpool-config.cmake"))
    config.write_text(config.read_text().replace(tools["deps"], "/gone"))
    source = REPOSITORY / "runtime/examples/consumer"
    run(tools["cmake"], "-S", source, "-B", tmp_path / "a", f"-DCMAKE_PREFIX_PATH={prefix};{tools['deps']}")
    if Path("/usr/include/onnxruntime").exists():
        return  # found there
    command = [tools["cmake"], "-S", source, "-B", tmp_path / "b", f"-DCMAKE_PREFIX_PATH={prefix}"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    words = "add the folder whose include and lib have ONNX Runtime's headers and library to CMAKE_PREFIX_PATH"
    assert done.returncode
    assert words in " ".join(done.stderr.split())


def test_a_package_needs_no_headers_of_onnx_runtime(
    built: Path, tools: dict[str, str], bundle: Bundle, greedy: list[int], tmp_path: Path
) -> None:
    """Where they have gone, or never were: its library alone is linked."""
    prefix, consumer = tmp_path / "prefix", tmp_path / "consumer"
    run(tools["cmake"], "--install", built, "--prefix", prefix)
    config = next(prefix.glob("lib*/**/headpool-config.cmake"))
    text = config.read_text()
    line = next(line for line in text.splitlines() if line.startswith("set(headpool_ONNXRUNTIME_INCLUDE_DIR"))
    config.write_text(text.replace(line, 'set(headpool_ONNXRUNTIME_INCLUDE_DIR "/gone")'))
    source = REPOSITORY / "runtime/examples/consumer"
    run(tools["cmake"], "-S", source, "-B", consumer, f"-DCMAKE_PREFIX_PATH={prefix}")
    run(tools["cmake"], "--build", consumer)
    for program in ("consumer", "consumer_static", "consumer_c"):
        assert run(consumer / program, bundle.path, *PROMPT) == f"{greedy[0]}\n"


def test_as_a_part_of_another_project(tools: dict[str, str], tmp_path: Path) -> None:
    """The library alone, without tests and examples."""
    lines = (
        "cmake_minimum_required(VERSION 3.22)",
        "project(whole LANGUAGES CXX)",
        f"add_subdirectory({REPOSITORY}/runtime headpool)",
    )
    (tmp_path / "CMakeLists.txt").write_text("\n".join(lines))
    run(tools["cmake"], "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={tools['deps']}", "-GUnix Makefiles")
    targets = run(tools["cmake"], "--build", tmp_path / "build", "--target", "help").replace("...", "").split()
    assert {"headpool_runtime", "headpool_runtime_static"} <= set(targets)
    assert not {"kernel_tests", "generate", "bench", "sessions", "fuzz"} & set(targets)


def test_the_pkg_config_file_names_the_folders_that_were_chosen(tools: dict[str, str], tmp_path: Path) -> None:
    """Below the prefix as distributions have it, and anywhere else."""
    for libdir, expected in (("lib/deep", "${prefix}/lib/deep"), ("/elsewhere/lib64", "/elsewhere/lib64")):
        build = tmp_path / libdir.replace("/", "-")
        command = [tools["cmake"], "-S", REPOSITORY / "runtime", "-B", build, f"-DCMAKE_PREFIX_PATH={tools['deps']}"]
        run(*command, "-DHEADPOOL_TESTS=OFF", f"-DCMAKE_INSTALL_LIBDIR={libdir}", "-DCMAKE_INSTALL_INCLUDEDIR=/include")
        lines = (build / "src/headpool.pc").read_text().splitlines()
        assert {f"libdir={expected}", "includedir=/include"} <= set(lines)


def test_what_a_build_lacks(tools: dict[str, str], tmp_path: Path) -> None:
    """Is said by its name, and nothing is built."""
    command = [tools["cmake"], "-S", REPOSITORY / "runtime", "-B", tmp_path, "-DCMAKE_FIND_ROOT_PATH=/nowhere"]
    command += ["-DCMAKE_FIND_ROOT_PATH_MODE_INCLUDE=ONLY", "-DCMAKE_FIND_ROOT_PATH_MODE_PACKAGE=ONLY"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode
    words = " ".join(done.stderr.split())
    assert "headpool needs ONNX Runtime's headers and library and nlohmann-json, not found here: add a prefix" in words


LANGUAGES = [("cc", "c90"), ("cc", "c99"), ("cc", "c11"), ("c++", "c++11"), ("c++", "c++20")]


@pytest.mark.parametrize(("compiler", "standard"), LANGUAGES, ids=[standard for _, standard in LANGUAGES])
def test_the_c_header_in_every_language(compiler: str, standard: str, tools: dict[str, str], tmp_path: Path) -> None:
    """Without a warning, HP_INIT of every struct."""
    types = ("hp_model_options", "hp_model_info", "hp_session_options", "hp_sampling")
    structs = "".join(f"  {name} a_{name} = HP_INIT({name});\n" for name in types)
    sizes = " + ".join(f"(a_{name}.size == sizeof({name}))" for name in types)
    (tmp_path / "main.c").write_text(f"#include <headpool/headpool.h>\nint main(void) {{\n{structs}  return {sizes} - 4;\n}}\n")
    language = "c++" if compiler == "c++" else "c"
    words = ["-Wall", "-Wextra", "-pedantic", "-Werror", "-I", REPOSITORY / "runtime/include", "-o", tmp_path / "program"]
    run(compiler, f"-std={standard}", "-x", language, *words, tmp_path / "main.c")
    run(tmp_path / "program")


def test_without_a_compiler_the_tests_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=r"^the C\+\+ tests need a compiler$"):
        lacking("a compiler")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match=r"^the C\+\+ tests need a compiler$"):
        lacking("a compiler")
