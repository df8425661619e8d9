"""A ledger is read a stretch of updates at a time, and nothing shows of how it was cut, nor of how its parts were."""

from random import Random

import pyarrow.compute as pc
import pytest
from ledger_rows import DOMAINS, UNITS, Piece, Visit, expected, random_visits, told, write_ledger

from hf_datashapley import load_value_history, load_values
from hf_datashapley.ledger import stretches, sums
from hf_datashapley.ledger.stretches import LedgerRows


def rounded(random, visits):
    """The same visits, with values whose sums depend on their order."""
    return [
        Visit(
            visit.step,
            visit.sample_id,
            [
                Piece(
                    p.document_id, p.position, [[random.gauss(0, 1) * 10.0 ** random.randint(-6, 3)] for _ in p.values]
                )
                for p in visit.pieces
            ],
            visit.rank,
        )
        for visit in visits
    ]


def readings(directory):
    found = [load_value_history(directory), load_values(directory), load_values(directory, normalize="update")]
    found += [load_values(directory, by="sample_id"), load_values(directory, from_step=2, to_step=4)]
    if "document_id" in found[0].column_names:
        found += [load_values(directory, by="document_id"), load_values(directory, by=DOMAINS)]
    return [reading.to_dict() for reading in found]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("seed", range(4))
def test_no_bit_depends_on_stretches_or_parts(tmp_path, monkeypatch, unit, seed):
    random = Random(seed)
    visits = rounded(random, random_visits(random, steps=6, ranks=2))
    chosen = {visit.sample_id for visit in visits if random.random() < 0.5}
    for name, cuts in (("one", [6]), ("cut", [1, 4, 6])):
        write_ledger(tmp_path / name, visits, unit, [""], with_tokens=chosen, cuts=cuts, ranks=2)
    whole = readings(tmp_path / "one")
    assert readings(tmp_path / "cut") == whole
    for rows in (1, 5):
        monkeypatch.setattr(stretches, "ROWS_AT_ONCE", rows)
        monkeypatch.setattr(sums, "ROWS_AT_ONCE", rows)
        assert readings(tmp_path / "cut") == whole


def test_stretches_are_of_whole_updates(tmp_path, monkeypatch):
    """Two ranks that cut their parts at other updates: what one has read ahead waits for the other."""
    visits = [Visit(step, rank, [Piece(0, 0, [[float(step)]])], rank) for step in range(1, 9) for rank in (0, 1)]
    write_ledger(tmp_path / "even", visits, "sample", [""], cuts=[4, 8], ranks=2)
    write_ledger(tmp_path, visits, "sample", [""], cuts=[2, 5, 8], ranks=2)
    for path in tmp_path.glob("values-*-00001-of-00002.parquet"):
        path.unlink()
    for path in (tmp_path / "even").glob("values-*-00001-of-00002.parquet"):
        path.rename(tmp_path / path.name)
    monkeypatch.setattr(stretches, "ROWS_AT_ONCE", 1)
    rows = LedgerRows.open(tmp_path)
    found = [table["step"].to_pylist() for table in rows.stretches(*rows.window())]
    assert len(found) > 2
    assert [step for steps in found for step in steps] == [step for step in range(1, 9) for _ in range(2)]
    assert all(earlier[-1] < later[0] for earlier, later in zip(found, found[1:], strict=False) if earlier and later)
    assert told(load_values(tmp_path), ["sample_id"]) == expected(visits, lambda i, d, p: i)


def test_only_a_stretch_is_in_memory(tmp_path, monkeypatch):
    """Of 40 updates with 50 rows each, 100 rows at a time, and the sums of 50 samples."""
    random = Random(0)
    visits = [Visit(step, i, [Piece(0, 0, [[random.random()]])]) for step in range(1, 41) for i in range(50)]
    write_ledger(tmp_path, visits, "sample", [""], cuts=list(range(1, 41)))
    monkeypatch.setattr(stretches, "ROWS_AT_ONCE", 100)
    monkeypatch.setattr(sums, "ROWS_AT_ONCE", 100)
    added, seen = sums._added, []

    def measured(total, held, keys):
        seen.append(total.num_rows + pc.sum([table.num_rows for table in held]).as_py() if held else 0)
        return added(total, held, keys)

    monkeypatch.setattr(sums, "_added", measured)
    assert len(load_values(tmp_path)) == 50
    assert max(seen) == 150
    assert len(seen) >= 20
