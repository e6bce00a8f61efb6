"""An archive's names mean the same in every source, other names only in their own."""

import pyarrow as pa
import pytest

from derm_pipeline.sources.identity import archive_names, shared_names


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("ISIC_0000091", "ISIC_0000091"),
        ("ISIC_0000091_downsampled", "ISIC_0000091"),
        ("HAM_0000118", "HAM_0000118"),
        ("BCN_0001234", "BCN_0001234"),
        ("MSK4_0011169", "MSK4_0011169"),
        ("IL_6890425", "IL_6890425"),
        ("IP_6890425", "IP_6890425"),
        ("ISIC_12", None),
        ("isic_0000091", "ISIC_0000091"),
        ("Isic_0000091_DOWNSAMPLED", "ISIC_0000091"),
        ("5E82A45BC5D78BD24AE9202D194423F8", "5e82a45bc5d78bd24ae9202d194423f8"),
        ("ISIC_0000091_large", None),
        ("XISIC_0000091", None),
        ("", None),
        (None, None),
    ],
)
def test_archive_names(written, name):
    assert archive_names(pa.array([written], pa.string())).to_pylist() == [name]
    assert archive_names(pa.chunked_array([[], [written]], pa.string())).to_pylist() == [name]


def test_an_id_of_no_archive_stays_within_its_source():
    rows = pa.table(
        {
            "source": ["a", "b", "a"],
            "image_id": ["1", "1", "ISIC_0000091_downsampled"],
            "sha256": ["x", "x", "y"],
            "lesion_id": ["L1", "L1", "HAM_0000118"],
            "patient_id": pa.array([None, "", "P1"], pa.string()),
        }
    )
    assert {kind: names.to_pylist() for kind, names in shared_names(rows)} == {
        "lesion": ["a/L1", "b/L1", "HAM_0000118"],
        "patient": [None, None, "a/P1"],
        "digest": ["x", "x", "y"],
        "image": [None, None, "ISIC_0000091"],
    }
