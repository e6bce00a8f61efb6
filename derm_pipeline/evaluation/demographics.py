"""Which groups an image belongs to: the columns of the records by which figures are told apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from derm_pipeline.records import AgeBand
from derm_pipeline.sources.identity import archive_names

if TYPE_CHECKING:
    import pandas as pd


def age_band(age_years: float | None) -> str | None:
    """The band of an age in years: 0-29, 30-49, 50-69 or 70+; None where it is unknown (None or NaN).

    Raises:
        ValueError: an age below 0 or above 200.
    """
    return None if age_years is None or np.isnan(age_years) else AgeBand.of(age_years).value


def demographics(records: pa.Table | pd.DataFrame) -> pd.DataFrame:
    """The columns that make groups, a row a record, in the records' order; unknown is None.

    Returns:
        source, image_id, lesion_id (else the patient, else the image itself, so that it can cluster), patient_id (else
        the lesion_id), diagnosis, malignant, skin_tone (light, medium, dark), sex, age_band, site; and ethnicity where
        any is known.
    """
    import pandas as pd

    columns = ["source", "image_id", "lesion_id", "patient_id", "diagnosis", "malignant"]
    columns += ["skin_tone", "sex", "age_years", "age_range", "site", "ethnicity"]
    table = records[columns] if isinstance(records, pd.DataFrame) else records.select(columns).to_pandas()
    table = table.astype(object).where(table.notna(), None)
    lesion = table.lesion_id.fillna(table.patient_id).fillna(table.image_id)
    facts = pd.DataFrame(
        {
            "source": table.source,
            "image_id": table.image_id,
            "lesion_id": _unique(table.source, lesion),
            "patient_id": _unique(table.source, table.patient_id.fillna(lesion)),
            "diagnosis": table.diagnosis,
            "malignant": _mapped(table.malignant, bool),
            "skin_tone": table.skin_tone,
            "sex": table.sex,
            "age_band": _mapped(table.age_years, age_band).fillna(_mapped(table.age_range, _band_of_range)),
            "site": table.site,
            "ethnicity": table.ethnicity,
        }
    )
    return facts if table.ethnicity.notna().any() else facts.drop(columns="ethnicity")


def _unique(source: pd.Series, ids: pd.Series) -> pd.Series:
    """Ids with their source before them, unless they are an archive's, which mean the same in every source."""
    import pandas as pd

    named = archive_names(pa.array(ids, pa.string())).to_pylist()
    own = (source + "/" + ids).tolist()
    return pd.Series([name or other for name, other in zip(named, own, strict=True)], index=ids.index, dtype=object)


def _band_of_range(age_range: str) -> str | None:
    band = AgeBand.of_range(age_range)
    return band.value if band else None


def _mapped(column: pd.Series, change: Any) -> pd.Series:
    import pandas as pd

    return pd.Series([None if value is None else change(value) for value in column], index=column.index, dtype=object)


def unknown_counts(
    table: pd.DataFrame, columns: Sequence[str] = ("skin_tone", "sex", "age_band", "site")
) -> dict[str, int]:
    """How many rows leave each of these columns unknown."""
    return {column: int(table[column].isna().sum()) for column in columns if column in table}
