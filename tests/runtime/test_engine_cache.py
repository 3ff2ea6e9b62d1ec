from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vggedge_runtime.engine_cache import EngineKey, list_engines, read_engine, write_engine
from vggedge_runtime.engine_layers import EngineAudit, EngineLayer
from vggedge_runtime.errors import EngineError

KEY = EngineKey(
    product="tensorrt",
    version="10.3.0",
    devices=("Orin (8.7)",),
    graph="int8",
    graph_sha256="ab" * 32,
    batches=(1, 1, 1),
    options={},
)
PLAN = b"ptrt" * 100

AUDIT = EngineAudit(
    layers=(
        EngineLayer(
            name="conv_U1", kind="correlation", inputs=("Int8",), weights=("Int8",), outputs=("Half",), nodes=("conv",)
        ),
    ),
    convolutions=1,
    dense=0,
    int8=("conv",),
    not_int8=(),
    untold=(),
    extra_kernels=0,
    extra_after={"conv": 0},
    quantizations=0,
    float_pools=0,
    float32_kernels=0,
    unasked_float32=(),
)

OTHERS: dict[str, Any] = {
    "product": "tensorrt_rtx",
    "version": "10.3.1",
    "devices": ("Thor (11.0)",),
    "graph": "fp16",
    "graph_sha256": "ba" * 32,
    "batches": (1, 4, 8),
    "options": {"workspace_bytes": "1"},
}


class TestFingerprint:
    def test_is_the_hash_of_canonical_json(self) -> None:
        text = json.dumps(msgspec.to_builtins(KEY), sort_keys=True, separators=(",", ":"))
        assert KEY.fingerprint == hashlib.sha256(text.encode()).hexdigest()[:16]

    def test_does_not_depend_on_the_order_of_options(self) -> None:
        one = msgspec.structs.replace(KEY, options={"a": "1", "b": "2"})
        other = msgspec.structs.replace(KEY, options={"b": "2", "a": "1"})
        assert one.fingerprint == other.fingerprint

    @pytest.mark.parametrize("field", EngineKey.__struct_fields__)
    def test_every_field_counts(self, field: str) -> None:
        assert msgspec.structs.replace(KEY, **{field: OTHERS[field]}).fingerprint != KEY.fingerprint


class TestWriteAndRead:
    def test_the_audit_is_kept(self, tmp_path: Path) -> None:
        record = write_engine(tmp_path, KEY, PLAN, 1.0, AUDIT)
        assert record.audit == AUDIT
        assert list_engines(tmp_path) == [record]
        assert list_engines(tmp_path)[0].audit == AUDIT

    def test_a_record_from_before_there_were_audits_is_read(self, tmp_path: Path) -> None:
        write_engine(tmp_path, KEY, PLAN, 1.0, AUDIT)
        path = tmp_path / "engines" / KEY.fingerprint / "engine.json"
        old = json.loads(path.read_bytes())
        del old["audit"]
        path.write_text(json.dumps(old))
        assert list_engines(tmp_path)[0].audit is None
        assert read_engine(tmp_path, KEY) == PLAN

    @pytest.mark.parametrize("kind", [bytes, memoryview])
    def test_the_plan_stays_byte_pure(self, kind: Any, tmp_path: Path) -> None:
        record = write_engine(tmp_path, KEY, kind(PLAN), 1.23456)
        folder = tmp_path / "engines" / KEY.fingerprint
        assert sorted(path.name for path in folder.iterdir()) == ["engine.json", "int8.engine"]
        assert (folder / "int8.engine").read_bytes() == PLAN
        assert (record.size_bytes, record.build_seconds) == (400, 1.235)
        assert record.sha256 == hashlib.sha256(PLAN).hexdigest()
        assert read_engine(tmp_path, KEY) == PLAN
        assert list_engines(tmp_path) == [record]

    def test_a_second_build_replaces_the_first(self, tmp_path: Path) -> None:
        write_engine(tmp_path, KEY, PLAN, 1)
        write_engine(tmp_path, KEY, b"newer", 1)
        assert read_engine(tmp_path, KEY) == b"newer"
        assert len(list_engines(tmp_path)) == 1

    @pytest.mark.parametrize("field", EngineKey.__struct_fields__)
    def test_another_key_finds_nothing(self, field: str, tmp_path: Path) -> None:
        write_engine(tmp_path, KEY, PLAN, 1)
        with pytest.raises(EngineError, match="no engine of graph"):
            read_engine(tmp_path, msgspec.structs.replace(KEY, **{field: OTHERS[field]}))

    def test_the_error_says_what_was_looked_for(self, tmp_path: Path) -> None:
        with pytest.raises(EngineError, match=r"no engine of graph int8 for tensorrt 10\.3\.0 on Orin \(8\.7\)"):
            read_engine(tmp_path, KEY)

    @pytest.mark.parametrize("plan", [PLAN[:-1], b"", PLAN[:-1] + b"\0", None])
    def test_a_changed_or_missing_plan_is_not_given_out(self, plan: bytes | None, tmp_path: Path) -> None:
        write_engine(tmp_path, KEY, PLAN, 1)
        path = tmp_path / "engines" / KEY.fingerprint / "int8.engine"
        path.unlink() if plan is None else path.write_bytes(plan)
        with pytest.raises(EngineError, match=r"int8\.engine: missing or changed.*build it again"):
            read_engine(tmp_path, KEY)

    def test_the_bytes_given_out_are_those_that_were_hashed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_engine(tmp_path, KEY, PLAN, 1)
        path = tmp_path / "engines" / KEY.fingerprint / "int8.engine"
        path_open = Path.open

        def open_and_replace(self: Path, *args: Any, **options: Any) -> Any:
            stream = path_open(self, *args, **options)
            if self == path:
                self.unlink()
                self.touch()
            return stream

        monkeypatch.setattr(Path, "open", open_and_replace)
        assert read_engine(tmp_path, KEY) == PLAN
        with pytest.raises(EngineError, match="missing or changed"):
            read_engine(tmp_path, KEY)

    @pytest.mark.parametrize("text", [b"", b"{}", b"[1", b"\xff"])
    def test_a_damaged_record(self, text: bytes, tmp_path: Path) -> None:
        write_engine(tmp_path, KEY, PLAN, 1)
        (tmp_path / "engines" / KEY.fingerprint / "engine.json").write_bytes(text)
        with pytest.raises(EngineError, match=r"engine\.json: damaged.*build the engine again"):
            list_engines(tmp_path)
        with pytest.raises(EngineError, match=r"engine\.json: damaged.*build the engine again"):
            read_engine(tmp_path, KEY)

    def test_a_record_of_another_engine_under_this_fingerprint(self, tmp_path: Path) -> None:
        other = msgspec.structs.replace(KEY, devices=("Thor (11.0)",))
        write_engine(tmp_path, other, PLAN, 1)
        engines = tmp_path / "engines"
        shutil.move(engines / other.fingerprint, engines / KEY.fingerprint)
        with pytest.raises(EngineError, match=r"is for devices.*Thor.*needed is.*Orin"):
            read_engine(tmp_path, KEY)

    def test_a_plan_outside_its_folder_is_not_read(self, tmp_path: Path) -> None:
        record = write_engine(tmp_path, KEY, PLAN, 1)
        folder = tmp_path / "engines" / KEY.fingerprint
        (folder / "int8.engine").rename(tmp_path / "secret")
        moved = msgspec.structs.replace(record, file="../../secret")
        (folder / "engine.json").write_bytes(msgspec.json.encode(moved))
        with pytest.raises(EngineError, match=r"secret'.*outside"):
            read_engine(tmp_path, KEY)

    def test_a_failing_write_leaves_the_old_engine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_engine(tmp_path, KEY, PLAN, 1)

        def fail(self: Path, target: Path) -> Path:
            raise OSError("disk full")

        monkeypatch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            write_engine(tmp_path, KEY, b"newer", 1)
        assert read_engine(tmp_path, KEY) == PLAN
        folder = tmp_path / "engines" / KEY.fingerprint
        assert sorted(path.name for path in folder.iterdir()) == ["engine.json", "int8.engine"]


class TestList:
    def test_none(self, tmp_path: Path) -> None:
        assert list_engines(tmp_path) == []

    def test_in_the_order_of_the_graphs(self, tmp_path: Path) -> None:
        for graph in ("int8", "fp32", "fp16"):
            write_engine(tmp_path, msgspec.structs.replace(KEY, graph=graph), PLAN, 1)
        assert [record.key.graph for record in list_engines(tmp_path)] == ["fp16", "fp32", "int8"]
