from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vggedge_runtime import engine_cache
from vggedge_runtime.engine_cache import (
    ENGINE_FORMAT_VERSION,
    ENGINE_UPGRADES,
    EngineKey,
    EngineRecord,
    EngineRequirement,
    build_command,
    compare_key,
    find_engine,
    list_engines,
    read_engine,
    scan_engines,
    write_engine,
)
from vggedge_runtime.engine_layers import EngineAudit, EngineLayer
from vggedge_runtime.errors import EngineError, UsageError

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


WANTED = EngineRequirement(
    product="tensorrt", version="10.3.0", device="Orin (8.7)", graph="int8", graph_sha256="ab" * 32, batch=1
)
RTX_KEY = msgspec.structs.replace(
    KEY, product="tensorrt_rtx", version="1.7.1", devices=("8.0", "8.6", "8.9", "12.0"), graph="int8-rtx"
)
RTX_WANTED = msgspec.structs.replace(
    WANTED, product="tensorrt_rtx", version="1.7.1", device="RTX 5090 (12.0)", graph="int8-rtx"
)
NEEDED: dict[str, Any] = {
    "product": "tensorrt_rtx",
    "version": "10.3.1",
    "device": "Thor (11.0)",
    "graph": "fp16",
    "graph_sha256": "ba" * 32,
    "batch": 2,
}
"""Another value for each field of WANTED."""


def change_record(bundle: Path, key: EngineKey, change: Callable[[dict[str, Any]], object]) -> None:
    """Change an engine.json in place."""
    path = bundle / "engines" / key.fingerprint / "engine.json"
    data = json.loads(path.read_bytes())
    change(data)
    path.write_text(json.dumps(data))


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
        with pytest.raises(EngineError, match=r"engine\.json: its key was changed, or it is not in its own folder"):
            read_engine(tmp_path, KEY)
        with pytest.raises(EngineError, match="no engine of graph"):
            read_engine(tmp_path, other)
        assert list(scan_engines(tmp_path).records) == []

    @pytest.mark.parametrize("field", EngineKey.__struct_fields__)
    def test_a_key_that_was_edited_is_not_believed(self, field: str, tmp_path: Path) -> None:
        write_engine(tmp_path, KEY, PLAN, 1)
        edited = msgspec.structs.replace(KEY, **{field: OTHERS[field]})
        change_record(tmp_path, KEY, lambda data: data.update(key=msgspec.to_builtins(edited)))
        assert "its key was changed" in scan_engines(tmp_path).unreadable[0]
        with pytest.raises(EngineError, match="no engine of graph"):
            read_engine(tmp_path, edited)

    def test_the_error_names_the_command(self, tmp_path: Path) -> None:
        with pytest.raises(
            EngineError, match=r"Build it with: vggedge build .* --for tensorrt --prec.* int8 --batch 1$"
        ):
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


class TestScan:
    def test_nothing(self, tmp_path: Path) -> None:
        assert scan_engines(tmp_path) == engine_cache.EngineScan(records={}, unreadable=())
        assert list_engines(tmp_path) == []

    def test_in_the_order_of_the_graphs(self, tmp_path: Path) -> None:
        for graph in ("int8", "fp32", "fp16"):
            write_engine(tmp_path, msgspec.structs.replace(KEY, graph=graph), PLAN, 1)
        assert [record.key.graph for record in list_engines(tmp_path)] == ["fp16", "fp32", "int8"]

    def test_records_go_by_the_names_of_their_folders(self, tmp_path: Path) -> None:
        written = write_engine(tmp_path, KEY, PLAN, 1)
        assert scan_engines(tmp_path).records == {KEY.fingerprint: written}

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            (b"", "damaged"),
            (b"{}", "damaged"),
            (b"[]", "damaged"),
            (b"\xff", "damaged"),
            (b'{"format_version": 99}', "format version 99"),
            (None, "damaged"),  # a folder in its place
        ],
    )
    def test_a_damaged_record_does_not_hide_the_others(self, text: bytes | None, reason: str, tmp_path: Path) -> None:
        kept = [write_engine(tmp_path, msgspec.structs.replace(KEY, graph=graph), PLAN, 1) for graph in ("a", "z")]
        write_engine(tmp_path, KEY, PLAN, 1)
        path = tmp_path / "engines" / KEY.fingerprint / "engine.json"
        path.unlink()
        if text is None:
            path.mkdir()
        else:
            path.write_bytes(text)
        scan = scan_engines(tmp_path)
        assert list(scan.records.values()) == kept
        assert len(scan.unreadable) == 1
        assert str(path) in scan.unreadable[0]
        assert reason in scan.unreadable[0]
        with pytest.raises(EngineError, match=reason):
            list_engines(tmp_path)

    def test_a_build_that_was_killed_before_its_record_is_no_engine(self, tmp_path: Path) -> None:
        write_engine(tmp_path, KEY, PLAN, 1)
        (tmp_path / "engines" / KEY.fingerprint / "engine.json").unlink()
        assert scan_engines(tmp_path) == engine_cache.EngineScan(records={}, unreadable=())


class TestFormatVersions:
    def test_is_written(self, tmp_path: Path) -> None:
        write_engine(tmp_path, KEY, PLAN, 1)
        text = (tmp_path / "engines" / KEY.fingerprint / "engine.json").read_text()
        assert text.startswith(f'{{\n  "format_version": {ENGINE_FORMAT_VERSION},\n')

    def test_there_is_an_upgrade_from_every_older_version(self) -> None:
        assert set(ENGINE_UPGRADES) == set(range(1, ENGINE_FORMAT_VERSION))

    def test_a_record_without_a_version_is_of_version_1(self, tmp_path: Path) -> None:
        written = write_engine(tmp_path, KEY, PLAN, 1)
        change_record(tmp_path, KEY, lambda data: (data.pop("format_version"), data.pop("built")))
        assert list_engines(tmp_path) == [msgspec.structs.replace(written, format_version=1, built="")]
        assert read_engine(tmp_path, KEY) == PLAN

    def test_one_from_the_future_is_refused_by_name(self, tmp_path: Path) -> None:
        write_engine(tmp_path, KEY, PLAN, 1)
        future = ENGINE_FORMAT_VERSION + 1
        change_record(tmp_path, KEY, lambda data: data.update(format_version=future, key="another schema"))
        message = rf"engine\.json: format version {future}; .* up to {ENGINE_FORMAT_VERSION}\. Upgrade.*or delete"
        with pytest.raises(EngineError, match=message):
            list_engines(tmp_path)
        with pytest.raises(EngineError, match=message):
            read_engine(tmp_path, KEY)
        with pytest.raises(EngineError, match=message):
            find_engine(tmp_path, WANTED)

    def test_an_upgrade_that_adds_to_the_key_leaves_the_engine_where_it_is(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_engine(tmp_path, KEY, PLAN, 1)
        change_record(tmp_path, KEY, lambda data: data.pop("format_version"))  # of version 1
        newer = msgspec.structs.replace(KEY, options={"level": "3"})

        def add_option(data: dict[str, Any]) -> dict[str, Any]:
            return data | {"key": data["key"] | {"options": {"level": "2"}}}

        def raise_option(data: dict[str, Any]) -> dict[str, Any]:
            level = int(data["key"]["options"]["level"]) + 1  # needs the one before
            return data | {"key": data["key"] | {"options": {"level": str(level)}}}

        monkeypatch.setattr(engine_cache, "ENGINE_FORMAT_VERSION", 3)
        monkeypatch.setattr(engine_cache, "ENGINE_UPGRADES", {2: raise_option, 1: add_option})
        scan = scan_engines(tmp_path)
        assert list(scan.records) == [KEY.fingerprint] != [newer.fingerprint]
        assert (scan.records[KEY.fingerprint].key, scan.records[KEY.fingerprint].format_version) == (newer, 3)
        assert read_engine(tmp_path, newer) == PLAN
        assert find_engine(tmp_path, WANTED).key == newer

    def test_an_upgrade_that_does_not_find_what_it_needs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_engine(tmp_path, KEY, PLAN, 1)
        monkeypatch.setattr(engine_cache, "ENGINE_FORMAT_VERSION", 2)
        monkeypatch.setattr(engine_cache, "ENGINE_UPGRADES", {1: lambda data: data | {"x": data["lost"]}})
        assert "damaged (not what format version 1 had: KeyError('lost'))" in scan_engines(tmp_path).unreadable[0]

    def test_stored_engines_are_read(self) -> None:
        for bundle in sorted(Path(__file__).with_name("fixtures").glob("bundle_*")):
            record = list_engines(bundle)[0]
            assert (record.key.graph, record.key.devices) == ("mixed-rtx", ("8.6", "12.0"))
            assert record.audit == AUDIT
            wanted = msgspec.structs.replace(
                RTX_WANTED, version=record.key.version, graph="mixed-rtx", graph_sha256=record.key.graph_sha256
            )
            assert read_engine(bundle, find_engine(bundle, wanted).key) == b"hashed like a plan, and none"


class TestFind:
    @pytest.mark.parametrize(("key", "wanted"), [(KEY, WANTED), (RTX_KEY, RTX_WANTED)])
    def test_what_fits(self, key: EngineKey, wanted: EngineRequirement, tmp_path: Path) -> None:
        record = write_engine(tmp_path, key, PLAN, 1)
        assert find_engine(tmp_path, wanted) == record

    @pytest.mark.parametrize("field", EngineRequirement.__struct_fields__)
    def test_one_field_that_differs_is_named_with_both_values(self, field: str, tmp_path: Path) -> None:
        write_engine(tmp_path, KEY, PLAN, 1)
        wanted = msgspec.structs.replace(WANTED, **{field: NEEDED[field]})
        found = {"device": "Orin (8.7)", "batch": "1"}.get(field) or getattr(KEY, field)
        mismatches = compare_key(KEY, wanted)
        assert [(each.field, each.found, each.needed) for each in mismatches] == [(field, found, str(NEEDED[field]))]
        with pytest.raises(EngineError) as caught:
            find_engine(tmp_path, wanted)
        assert f"nearest: {field} is {found}, needed is {NEEDED[field]}. Build one" in str(caught.value)
        assert str(caught.value).endswith(build_command(tmp_path, wanted.product, wanted.graph, wanted.batch))

    @pytest.mark.parametrize(
        ("devices", "device", "fits"),
        [
            (("8.6",), "RTX 3090 (8.6)", True),
            (("8.0", "8.6"), "RTX 3060 (8.6)", True),
            (("12.0",), "GB10 (12.1)", False),
            (("12.1",), "RTX 5090 (12.0)", False),
            (("8.0", "8.9", "12.0"), "H200 (9.0)", False),
            (("8.0",), "RTX 3090 (8.6)", False),
            (("1.2",), "RTX 5090 (11.2)", False),
            (("RTX 3090 (8.6)",), "RTX 3090 (8.6)", True),
            (("RTX 3090 (8.6)",), "RTX 3060 (8.6)", False),
            (("RTX 3090 (8.6)",), "RTX 3090 (8.9)", False),
        ],
    )
    def test_targets_of_tensorrt_rtx_fit_just_those_named(
        self, devices: tuple[str, ...], device: str, fits: bool
    ) -> None:
        key = msgspec.structs.replace(RTX_KEY, devices=devices)
        mismatches = compare_key(key, msgspec.structs.replace(RTX_WANTED, device=device))
        assert [each.field for each in mismatches] == ([] if fits else ["device"])

    def test_tensorrt_proper_has_no_targets(self) -> None:
        key = msgspec.structs.replace(KEY, devices=("8.7",))
        assert [each.field for each in compare_key(key, WANTED)] == ["device"]

    @pytest.mark.parametrize(("batch", "fits"), [(1, False), (2, True), (3, True), (8, True), (9, False)])
    def test_the_batch_is_one_of_the_profile(self, batch: int, fits: bool, tmp_path: Path) -> None:
        write_engine(tmp_path, msgspec.structs.replace(KEY, batches=(2, 4, 8)), PLAN, 1)
        wanted = msgspec.structs.replace(WANTED, batch=batch)
        if fits:
            assert find_engine(tmp_path, wanted).key.batches == (2, 4, 8)
        else:
            with pytest.raises(EngineError, match=rf"batch is 2 to 8, needed is {batch}\..*--batch {batch}$"):
                find_engine(tmp_path, wanted)

    def test_the_best_batch_comes_before_the_newest_and_options_do_not_count(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        build(tmp_path, monkeypatch, "2026-01-02", batches=(1, 1, 1), options={"level": "3"})
        build(tmp_path, monkeypatch, "2026-01-03", batches=(1, 1, 1), options={"level": "5"})
        build(tmp_path, monkeypatch, "2026-01-01", batches=(1, 4, 8))
        build(tmp_path, monkeypatch, "2026-01-09", batches=(1, 2, 8))
        expected = {1: ("2026-01-03", 1), 2: ("2026-01-09", 2), 3: ("2026-01-09", 2), 4: ("2026-01-01", 4)}
        for batch, (built, best) in expected.items():
            found = find_engine(tmp_path, msgspec.structs.replace(WANTED, batch=batch))
            assert (found.built, found.key.batches[1]) == (built, best)

    def test_one_from_before_there_were_times_is_the_oldest(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        build(tmp_path, monkeypatch, "", options={"level": "3"})
        build(tmp_path, monkeypatch, "2026-01-01", options={"level": "1"})
        assert find_engine(tmp_path, WANTED).key.options == {"level": "1"}

    def test_the_nearest_is_of_the_graph_and_the_product_if_there_is_one(self, tmp_path: Path) -> None:
        write_engine(tmp_path, msgspec.structs.replace(KEY, graph="fp16"), PLAN, 1)
        far = msgspec.structs.replace(KEY, version="9", devices=("Thor (11.0)",), graph_sha256="0", batches=(2, 2, 2))
        write_engine(tmp_path, far, PLAN, 1)
        write_engine(tmp_path, msgspec.structs.replace(KEY, product="tensorrt_rtx"), PLAN, 1)
        with pytest.raises(EngineError, match=rf"of the 3 in the bundle, engines/{far.fingerprint} is nearest"):
            find_engine(tmp_path, WANTED)

    def test_an_empty_bundle(self, tmp_path: Path) -> None:
        message = r"no engine fits graph int8, batch 1, tensorrt 10\.3\.0 on Orin \(8\.7\): the bundle has none\. Build"
        with pytest.raises(EngineError, match=message):
            find_engine(tmp_path, WANTED)

    def test_a_damaged_neighbour_is_reported_and_not_fatal(self, tmp_path: Path) -> None:
        record = write_engine(tmp_path, KEY, PLAN, 1)
        other = msgspec.structs.replace(KEY, version="10.4.0")
        write_engine(tmp_path, other, PLAN, 1)
        (tmp_path / "engines" / other.fingerprint / "engine.json").write_text("{")
        said: list[str] = []
        assert find_engine(tmp_path, WANTED, said.append) == record
        assert len(said) == 1
        assert f"{other.fingerprint}/engine.json: damaged" in said[0]
        with pytest.raises(EngineError, match=rf"(?s)version is 10\.3\.0, needed.*{other.fingerprint}.*damaged"):
            find_engine(tmp_path, msgspec.structs.replace(WANTED, version="10.4.0"))

    @pytest.mark.parametrize(("field", "value"), [("device", "Orin"), ("device", "8.7"), ("batch", 0)])
    def test_a_requirement_that_makes_no_sense(self, field: str, value: Any) -> None:
        with pytest.raises(UsageError, match=field):
            EngineRequirement(**msgspec.to_builtins(WANTED) | {field: value})

    def test_the_command_is_for_a_shell(self) -> None:
        command = build_command(Path("my bundle"), "tensorrt_rtx", "mixed-rtx", 4)
        assert command == "vggedge build 'my bundle' --for rtx --precision mixed-rtx --batch 4"

    @pytest.mark.parametrize(
        ("changes", "end"),
        [
            ({"device": "GB10 (12.1)"}, "--batch 1 --target 12.1"),
            ({"device": "GB10 (12.1)", "version": "2"}, "--batch 1 --target 12.1"),
            ({"version": "2"}, "--batch 1"),
            ({"batch": 3}, "--batch 3"),
        ],
    )
    def test_the_command_names_the_target_where_the_usual_ones_lack_it(
        self, changes: dict[str, Any], end: str, tmp_path: Path
    ) -> None:
        write_engine(tmp_path, RTX_KEY, PLAN, 1)
        with pytest.raises(EngineError, match=rf"Build one with: .* --for rtx --precision int8-rtx {end}$"):
            find_engine(tmp_path, msgspec.structs.replace(RTX_WANTED, **changes))

    def test_what_is_tuned_on_the_device_is_built_there(self, tmp_path: Path) -> None:
        write_engine(tmp_path, KEY, PLAN, 1)
        with pytest.raises(EngineError, match=r"Build one there with: .* --for tensorrt --precision int8 --batch 1$"):
            find_engine(tmp_path, msgspec.structs.replace(WANTED, device="Thor (11.0)"))


def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: str, **changes: Any) -> EngineRecord:
    """Write an engine as if it had been built at ``built``."""
    record = write_engine(tmp_path, msgspec.structs.replace(KEY, **changes), PLAN, 1)
    change_record(tmp_path, record.key, lambda data: data.update(built=built))
    return msgspec.structs.replace(record, built=built)


class TestSideBySide:
    """Many engines in one bundle, drawn at random; what a plain reading of the rules says is what is found."""

    DEVICES = ("Orin (8.7)", "Thor (11.0)", "RTX 3090 (8.6)", "RTX 3060 (8.6)", "RTX 5090 (12.0)", "GB10 (12.1)")

    def draw_key(self, rng: random.Random) -> EngineKey:
        product = rng.choice(("tensorrt", "tensorrt_rtx"))
        ahead = product == "tensorrt_rtx" and rng.random() < 0.7
        targets = tuple(rng.sample(("8.0", "8.6", "12.0", "12.1"), rng.randint(1, 3)))
        batches = tuple(sorted(rng.choices((1, 2, 4, 8), k=3)))
        return EngineKey(
            product=product,
            version=rng.choice(("1.7.1", "10.3.0")),
            devices=targets if ahead else (rng.choice(self.DEVICES),),
            graph=rng.choice(("fp16", "int8")),
            graph_sha256=rng.choice(("aa", "bb")),
            batches=(batches[0], batches[1], batches[2]),
            options={"level": rng.choice("123")},
        )

    def draw_wanted(self, rng: random.Random) -> EngineRequirement:
        return EngineRequirement(
            product=rng.choice(("tensorrt", "tensorrt_rtx")),
            version=rng.choice(("1.7.1", "10.3.0")),
            device=rng.choice(self.DEVICES),
            graph=rng.choice(("fp16", "int8")),
            graph_sha256=rng.choice(("aa", "bb")),
            batch=rng.choice((1, 2, 3, 8, 16)),
        )

    def fits(self, key: EngineKey, wanted: EngineRequirement) -> bool:
        capability = wanted.device.split("(")[1].rstrip(")")
        devices = [wanted.device, *([capability] if wanted.product == "tensorrt_rtx" else [])]
        return (
            (key.product, key.version, key.graph, key.graph_sha256)
            == (wanted.product, wanted.version, wanted.graph, wanted.graph_sha256)
            and any(device in key.devices for device in devices)
            and wanted.batch in range(key.batches[0], key.batches[2] + 1)
        )

    @pytest.mark.parametrize("seed", range(6))
    def test_random_bundles(self, seed: int, tmp_path: Path) -> None:
        rng = random.Random(seed)
        plans: dict[str, tuple[EngineKey, bytes]] = {}
        for index in range(60):
            key = self.draw_key(rng)
            plans[key.fingerprint] = (key, f"plan {index}".encode())
            write_engine(tmp_path, *plans[key.fingerprint], 1)
        broken = rng.sample(sorted(plans), 5)
        for name in broken:
            (tmp_path / "engines" / name / "engine.json").write_text("[")
        scan = scan_engines(tmp_path)
        assert set(scan.records) == set(plans) - set(broken)
        assert len(scan.unreadable) == 5
        there = {name: plan for name, plan in plans.items() if name not in broken}

        found = 0
        for _ in range(40):
            wanted = self.draw_wanted(rng)
            fitting = [key for key, _ in there.values() if self.fits(key, wanted)]
            if not fitting:
                with pytest.raises(EngineError, match=r"no engine fits.* is nearest: .* needed is .*Build one"):
                    find_engine(tmp_path, wanted)
                continue
            found += 1
            record = find_engine(tmp_path, wanted)
            assert record.key in fitting
            best = [key for key in fitting if key.batches[1] == wanted.batch]
            assert not best or record.key in best
            newest = max(scan.records[key.fingerprint].built for key in best or fitting)
            assert record.built == newest
            assert read_engine(tmp_path, record.key) == there[record.key.fingerprint][1]
        assert found >= 3  # else nothing was tested
