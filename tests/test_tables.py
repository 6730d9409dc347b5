from letit_dist.evaluation.tables import markdown


def test_tables():
    rows = [{"method": "a", "value": 0.123456, "count": 3}, {"method": "longer", "value": None}]
    assert markdown(rows).splitlines() == [
        "| method | value  | count |",
        "| ------ | ------ | ----- |",
        "| a      | 0.1235 | 3     |",
        "| longer | -      | -     |",
    ]
    assert markdown(rows, ["count"]).splitlines() == ["| count |", "| ----- |", "| 3     |", "| -     |"]
    assert "1.235e-05" in markdown([{"x": 0.0000123456}])
