//! `fill_packed`: composed factors, from arrays that Python owns into arrays that Python owns.

use std::num::NonZeroUsize;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyString, PyTuple};
use qwenlora_core::packed::{
    self, Column, ColumnOf, DownMemberOf, ElementSize, PackedOf, Recipe, Side, Table, Unpacking,
    Untouched, UpMemberOf,
};

use crate::bytes::{Dest, Place, Source, check_apart};

type Object<'py> = Bound<'py, PyAny>;

/// Fills composed factors in the packed layout.
///
/// A recipe is `(dest, slots, channels, element_bytes, columns)`: the same factor of some slots, one
/// after the other in `dest`. The columns of a channel tile, in order: `("fragments", [(source,
/// source_tiles), ...], first, count)` with a source for every slot, `("down", tiles, [(source,
/// rank, rank_begin), ...])`, `("up", tiles, [(source, table, row_begin, row_count, rank,
/// rank_begin), ...])`, `("up over", ...)`, which leaves fragments as they are that none of its
/// members touches, `("zero", tiles)`, `("keep", tiles)`. A source of a member holds all slots. A
/// table is `None`, or has for every value of two bytes the two that stand for it. Arrays are
/// `uint8` of any shape, contiguous.
///
/// The arrays are borrowed from NumPy for the call and the GIL is released while Rust fills: the
/// caller must not touch them from another thread until the call returns.
#[pyfunction]
#[pyo3(signature = (recipes, *, threads))]
pub(crate) fn fill_packed(
    py: Python<'_>,
    recipes: Vec<PackedTuple<'_>>,
    threads: NonZeroUsize,
) -> PyResult<()> {
    let mut arguments = borrowed(py, &recipes)?;
    check_apart(arguments.iter().flat_map(PackedArgument::places).collect())?;
    let recipes = arguments.iter_mut().map(PackedArgument::recipe);
    let recipes = recipes.collect::<PyResult<Vec<_>>>()?;
    py.detach(|| packed::fill(recipes, threads))
        .map_err(|e| PyValueError::new_err(e.to_string()))
}

/// Brings a packed factor back to logical order.
///
/// `source` holds (channels/16, rank/16, 256) elements; `dest` as many, (rank, channels) where
/// `side` is "down", (channels, rank) where it is "up". Arrays are `uint8` of any shape, contiguous,
/// and borrowed for the call as those of `fill_packed` are.
#[pyfunction]
#[pyo3(signature = (source, dest, *, side, channels, element_bytes, threads))]
pub(crate) fn unpack_factor(
    py: Python<'_>,
    source: Object<'_>,
    dest: Object<'_>,
    side: &str,
    channels: usize,
    element_bytes: usize,
    threads: NonZeroUsize,
) -> PyResult<()> {
    let side = match side {
        "down" => Side::Down,
        "up" => Side::Up,
        other => {
            let message = format!("a side is `down` or `up`, got {other:?}");
            return Err(PyValueError::new_err(message));
        }
    };
    let (source, mut dest) = (Source::of(&source)?, Dest::of(&dest)?);
    check_apart(vec![source.place(), dest.place()])?;
    let mut unpacking = Unpacking {
        source: source.bytes()?,
        dest: dest.bytes()?,
        side,
        channels,
        element: element_of(element_bytes)?,
    };
    py.detach(|| packed::unpack(&mut unpacking, threads))
        .map_err(|e| PyValueError::new_err(e.to_string()))
}

fn element_of(bytes: usize) -> PyResult<ElementSize> {
    ElementSize::from_bytes(bytes)
        .ok_or_else(|| PyValueError::new_err(format!("elements have 2 or 4 bytes, got {bytes}")))
}

/// Borrows the arrays of all recipes; what is wrong with one is raised with its index.
pub(crate) fn borrowed<'py>(
    py: Python<'py>,
    recipes: &[PackedTuple<'py>],
) -> PyResult<Vec<PackedArgument<'py>>> {
    let arguments = recipes.iter().enumerate().map(|(index, recipe)| {
        PackedArgument::of(recipe).map_err(|error| {
            let message = format!("recipe {index}: {}", error.value(py));
            PyErr::from_type(error.get_type(py), message)
        })
    });
    arguments.collect()
}

/// (dest, slots, channels, bytes of an element, columns).
pub(crate) type PackedTuple<'py> = (Object<'py>, usize, usize, usize, Vec<Bound<'py, PyTuple>>);

/// One recipe of packed factors, its arrays borrowed.
pub(crate) struct PackedArgument<'py> {
    dest: Dest<'py>,
    slots: usize,
    channels: usize,
    element: ElementSize,
    columns: Vec<BorrowedColumn<'py>>,
}

impl<'py> PackedArgument<'py> {
    fn of((dest, slots, channels, element_bytes, columns): &PackedTuple<'py>) -> PyResult<Self> {
        let element = element_of(*element_bytes)?;
        let columns = columns.iter().map(borrowed_column);
        Ok(Self {
            dest: Dest::of(dest)?,
            slots: *slots,
            channels: *channels,
            element,
            columns: columns.collect::<PyResult<_>>()?,
        })
    }

    fn sources(&self) -> impl Iterator<Item = &Source<'py>> {
        self.columns.iter().flat_map(|column| {
            let (sources, tables) = column.holders();
            sources.into_iter().chain(tables)
        })
    }

    pub(crate) fn places(&self) -> impl Iterator<Item = Place> {
        self.sources().map(Source::place).chain([self.dest.place()])
    }

    /// All arrays.
    pub(crate) fn arrays(&self) -> impl Iterator<Item = Py<PyAny>> {
        self.sources().map(Source::array).chain([self.dest.array()])
    }

    /// The recipe, for as long as its arrays are borrowed.
    fn recipe(&mut self) -> PyResult<Recipe<'_>> {
        let columns = self.columns.iter();
        let columns = columns.map(|column| column_of(column, &Source::bytes));
        Ok(Recipe {
            dest: self.dest.bytes()?,
            slots: self.slots,
            channels: self.channels,
            element: self.element,
            columns: columns.collect::<PyResult<_>>()?,
        })
    }

    /// The recipe, for threads that follow it after the call has returned.
    ///
    /// # Safety
    /// All `arrays` must be kept until these threads are done, and nobody may touch the destination
    /// or write to a source before.
    #[expect(unsafe_code, reason = "bytes are lent beyond a call")]
    pub(crate) unsafe fn lent(&mut self) -> PyResult<Recipe<'static>> {
        let columns = self.columns.iter();
        // SAFETY: as the caller promises.
        let lent = |source: &Source<'py>| unsafe { source.lent() };
        let columns = columns.map(|column| column_of(column, &lent));
        Ok(Recipe {
            // SAFETY: as the caller promises.
            dest: unsafe { self.dest.lent() }?,
            slots: self.slots,
            channels: self.channels,
            element: self.element,
            columns: columns.collect::<PyResult<_>>()?,
        })
    }
}

/// A column of borrowed arrays. Its tables have a table's size.
type BorrowedColumn<'py> = ColumnOf<Source<'py>, Source<'py>>;

fn borrowed_column<'py>(column: &Bound<'py, PyTuple>) -> PyResult<BorrowedColumn<'py>> {
    let tag = column.get_item(0)?;
    let tag = tag.cast::<PyString>()?.to_str()?;
    Ok(match tag {
        "fragments" => {
            type Fragments<'py> = (Object<'py>, Vec<(Object<'py>, usize)>, usize, usize);
            let (_, sources, first, count): Fragments<'py> = column.extract()?;
            let sources = sources.iter().map(|(source, tiles)| {
                Ok(PackedOf {
                    source: Source::of(source)?,
                    tiles: *tiles,
                })
            });
            ColumnOf::Fragments {
                sources: sources.collect::<PyResult<_>>()?,
                first,
                count,
            }
        }
        "down" => {
            let (_, tiles, members): (Object<'py>, usize, Vec<_>) = column.extract()?;
            let members = members.iter().map(borrowed_down);
            ColumnOf::Down {
                tiles,
                members: members.collect::<PyResult<_>>()?,
            }
        }
        "up" | "up over" => {
            let (_, tiles, members): (Object<'py>, usize, Vec<_>) = column.extract()?;
            let members = members.iter().map(borrowed_up);
            ColumnOf::Up {
                tiles,
                members: members.collect::<PyResult<_>>()?,
                untouched: if tag == "up" {
                    Untouched::Zero
                } else {
                    Untouched::Keep
                },
            }
        }
        "zero" => {
            let (_, tiles): (Object<'py>, usize) = column.extract()?;
            ColumnOf::Zero { tiles }
        }
        "keep" => {
            let (_, tiles): (Object<'py>, usize) = column.extract()?;
            ColumnOf::Keep { tiles }
        }
        other => {
            return Err(PyValueError::new_err(format!(
                "a column is `fragments`, `down`, `up`, `up over`, `zero` or `keep`, got {other:?}"
            )));
        }
    })
}

fn borrowed_down<'py>(
    (source, rank, rank_begin): &(Object<'py>, usize, usize),
) -> PyResult<DownMemberOf<Source<'py>>> {
    Ok(DownMemberOf {
        source: Source::of(source)?,
        rank: *rank,
        rank_begin: *rank_begin,
    })
}

/// (source, table, first row, rows, rank, first rank).
type UpTuple<'py> = (Object<'py>, Option<Object<'py>>, usize, usize, usize, usize);

fn borrowed_up<'py>(
    (source, table, row_begin, row_count, rank, rank_begin): &UpTuple<'py>,
) -> PyResult<UpMemberOf<Source<'py>, Source<'py>>> {
    let table = table.as_ref().map(Source::of).transpose()?;
    if let Some(table) = &table {
        table_of(table.bytes()?)?;
    }
    Ok(UpMemberOf {
        source: Source::of(source)?,
        table,
        row_begin: *row_begin,
        row_count: *row_count,
        rank: *rank,
        rank_begin: *rank_begin,
    })
}

/// The column, of bytes that `bytes` gives.
fn column_of<'s, 'py, 'b>(
    column: &'s BorrowedColumn<'py>,
    bytes: &impl Fn(&'s Source<'py>) -> PyResult<&'b [u8]>,
) -> PyResult<Column<'b>> {
    column.try_map(bytes, |table| table_of(bytes(table)?))
}

fn table_of(bytes: &[u8]) -> PyResult<Table<'_>> {
    Table::from_bytes(bytes).ok_or_else(|| {
        PyValueError::new_err(format!(
            "a table has {} bytes, got {}",
            Table::LEN_BYTES,
            bytes.len()
        ))
    })
}
