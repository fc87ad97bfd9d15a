//! Rows of 4-bit weights and their norms, from arrays that Python owns into arrays that Python owns.

use std::num::NonZeroUsize;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use qwenlora_core::weight::{self, Awq, Svdq, SvdqForm, WeightFault};

use crate::bytes::{Dest, Source, check_apart};

type Object<'py> = Bound<'py, PyAny>;

/// Writes whole tiles of rows of an SVDQuant weight as float32.
///
/// `form` is "int4" or "fp4"; `values` (rows, columns/2) bytes packed, `scales` float32 in packed
/// order, `row_factors` (rows) float32 or None, `column_factors` (columns) float32, `dest` (rows,
/// columns) float32. Arrays are `uint8` of any shape, contiguous, and borrowed for the call as those
/// of `fill_packed` are.
#[pyfunction]
#[pyo3(signature = (form, values, scales, row_factors, column_factors, dest, *, threads))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments of Python")]
pub(crate) fn svdq_rows(
    py: Python<'_>,
    form: &str,
    values: Object<'_>,
    scales: Object<'_>,
    row_factors: Option<Object<'_>>,
    column_factors: Object<'_>,
    dest: Object<'_>,
    threads: NonZeroUsize,
) -> PyResult<()> {
    let form = match form {
        "int4" => SvdqForm::Int4,
        "fp4" => SvdqForm::Fp4,
        other => {
            let message = format!("a form is `int4` or `fp4`, got {other:?}");
            return Err(PyValueError::new_err(message));
        }
    };
    let (values, scales) = (Source::of(&values)?, Source::of(&scales)?);
    let row_factors = row_factors.as_ref().map(Source::of).transpose()?;
    let column_factors = Source::of(&column_factors)?;
    let mut dest = Dest::of(&dest)?;
    let mut places = vec![values.place(), scales.place(), column_factors.place()];
    places.extend(row_factors.iter().map(Source::place));
    places.push(dest.place());
    check_apart(places)?;
    let columns = column_factors.bytes()?.len() / 4;
    let own = Svdq {
        form,
        values: values.bytes()?,
        scales: scales.bytes()?,
        row_factors: row_factors.as_ref().map(Source::bytes).transpose()?,
        column_factors: column_factors.bytes()?,
        rows: (values.bytes()?.len() * 2)
            .checked_div(columns)
            .unwrap_or(0),
        columns,
    };
    let dest = dest.bytes()?;
    py.detach(|| own.write_to(dest, threads)).map_err(raise)
}

/// Writes logical rows of an AWQ weight as float32.
///
/// `values` is (rows/4, columns/2) words packed, `scales` and `zeros` (columns/64, rows) float32,
/// `dest` (`count`, columns) float32; arrays as those of `svdq_rows`.
#[pyfunction]
#[pyo3(signature = (values, scales, zeros, dest, *, rows, columns, planes, begin, count, threads))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments of Python")]
pub(crate) fn awq_rows(
    py: Python<'_>,
    values: Object<'_>,
    scales: Object<'_>,
    zeros: Object<'_>,
    dest: Object<'_>,
    rows: usize,
    columns: usize,
    planes: NonZeroUsize,
    begin: usize,
    count: usize,
    threads: NonZeroUsize,
) -> PyResult<()> {
    let sources = [
        Source::of(&values)?,
        Source::of(&scales)?,
        Source::of(&zeros)?,
    ];
    let mut dest = Dest::of(&dest)?;
    let mut places: Vec<_> = sources.iter().map(Source::place).collect();
    places.push(dest.place());
    check_apart(places)?;
    let own = Awq {
        values: sources[0].bytes()?,
        scales: sources[1].bytes()?,
        zeros: sources[2].bytes()?,
        rows,
        columns,
        planes,
    };
    let dest = dest.bytes()?;
    py.detach(|| own.write_to(begin, count, dest, threads))
        .map_err(raise)
}

/// Writes the squared norms of the rows of (rows, `columns`) float32 into (rows) float64.
#[pyfunction]
#[pyo3(signature = (matrix, norms, *, columns, threads))]
pub(crate) fn row_norms(
    py: Python<'_>,
    matrix: Object<'_>,
    norms: Object<'_>,
    columns: NonZeroUsize,
    threads: NonZeroUsize,
) -> PyResult<()> {
    norms_by(weight::row_norms, py, &matrix, &norms, columns, threads)
}

/// Adds the squared norms of the columns of (rows, `columns`) float32 to (`columns`) float64.
#[pyfunction]
#[pyo3(signature = (matrix, norms, *, columns, threads))]
pub(crate) fn column_norms(
    py: Python<'_>,
    matrix: Object<'_>,
    norms: Object<'_>,
    columns: NonZeroUsize,
    threads: NonZeroUsize,
) -> PyResult<()> {
    norms_by(weight::column_norms, py, &matrix, &norms, columns, threads)
}

type Norms = fn(&[u8], NonZeroUsize, &mut [u8], NonZeroUsize) -> Result<(), WeightFault>;

fn norms_by(
    compute: Norms,
    py: Python<'_>,
    matrix: &Object<'_>,
    norms: &Object<'_>,
    columns: NonZeroUsize,
    threads: NonZeroUsize,
) -> PyResult<()> {
    let (matrix, mut norms) = (Source::of(matrix)?, Dest::of(norms)?);
    check_apart(vec![matrix.place(), norms.place()])?;
    let (matrix, norms) = (matrix.bytes()?, norms.bytes()?);
    py.detach(|| compute(matrix, columns, norms, threads))
        .map_err(raise)
}

fn raise(fault: WeightFault) -> PyErr {
    PyValueError::new_err(fault.to_string())
}
