//! `fill_packed` and `fill_rows`: composed factors, from arrays that Python owns into arrays that Python owns.

use std::num::NonZeroUsize;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyString, PyTuple};
use qwenlora_core::packed::{self, Column, DownMember, ElementSize, Recipe, UpMember};
use qwenlora_core::rows::{self, RowsColumn, RowsRecipe};

use crate::bytes::{Dest, Place, Source, check_apart};

type Object<'py> = Bound<'py, PyAny>;

/// Fills composed factors in the packed layout.
///
/// A recipe is `(dest, channels, element_bytes, columns)`. The columns of a channel tile, in order:
/// `("fragments", source, source_tiles, first, count)`, `("down", tiles, [(source, rank,
/// rank_begin), ...])`, `("up", tiles, [(source, row_begin, row_count, rank, rank_begin), ...])`,
/// `("zero", tiles)`, `("keep", tiles)`. Arrays are `uint8` of any shape, contiguous.
///
/// The arrays are borrowed from NumPy for the call and the GIL is released while Rust fills: the
/// caller must not touch them from another thread until the call returns.
#[pyfunction]
#[pyo3(signature = (recipes, *, threads))]
pub(crate) fn fill_packed(
    py: Python<'_>,
    recipes: Vec<(Object<'_>, usize, usize, Vec<Bound<'_, PyTuple>>)>,
    threads: NonZeroUsize,
) -> PyResult<()> {
    let mut arguments = recipes
        .iter()
        .enumerate()
        .map(|(index, recipe)| RecipeArgument::of(recipe).map_err(|e| within(py, index, &e)))
        .collect::<PyResult<Vec<_>>>()?;
    check_apart(arguments.iter().flat_map(RecipeArgument::places).collect())?;
    let mut recipes = arguments
        .iter_mut()
        .map(RecipeArgument::recipe)
        .collect::<PyResult<Vec<_>>>()?;
    py.detach(|| packed::fill(&mut recipes, threads))
        .map_err(|e| PyValueError::new_err(e.to_string()))
}

/// Fills row-major factors side by side, their rows reordered.
///
/// A recipe is `(dest, rows, planes, columns)`; a column is `(source, width_bytes)`, the source of
/// shape (rows, `width_bytes`) or `None` for zeros. Row j (rows / planes) + c of a source goes to
/// row c planes + j; one plane keeps the order. Borrowing and threads are as in `fill_packed`.
#[pyfunction]
#[pyo3(signature = (recipes, *, threads))]
pub(crate) fn fill_rows(
    py: Python<'_>,
    recipes: Vec<(Object<'_>, usize, NonZeroUsize, Vec<RowsColumnTuple<'_>>)>,
    threads: NonZeroUsize,
) -> PyResult<()> {
    let mut arguments = recipes
        .iter()
        .enumerate()
        .map(|(index, (dest, rows, planes, columns))| {
            RowsArgument::of(dest, *rows, *planes, columns).map_err(|e| within(py, index, &e))
        })
        .collect::<PyResult<Vec<_>>>()?;
    check_apart(arguments.iter().flat_map(RowsArgument::places).collect())?;
    let mut recipes = arguments
        .iter_mut()
        .map(RowsArgument::recipe)
        .collect::<PyResult<Vec<_>>>()?;
    py.detach(|| rows::fill(&mut recipes, threads))
        .map_err(|e| PyValueError::new_err(e.to_string()))
}

/// (source, width in bytes).
type RowsColumnTuple<'py> = (Option<Object<'py>>, usize);

/// One recipe of rows, its arrays borrowed.
struct RowsArgument<'py> {
    dest: Dest<'py>,
    rows: usize,
    planes: NonZeroUsize,
    columns: Vec<(Option<Source<'py>>, usize)>,
}

impl<'py> RowsArgument<'py> {
    fn of(
        dest: &Object<'py>,
        rows: usize,
        planes: NonZeroUsize,
        columns: &[RowsColumnTuple<'py>],
    ) -> PyResult<Self> {
        let columns = columns
            .iter()
            .map(|(source, width)| Ok((source.as_ref().map(Source::of).transpose()?, *width)));
        Ok(Self {
            dest: Dest::of(dest)?,
            rows,
            planes,
            columns: columns.collect::<PyResult<_>>()?,
        })
    }

    fn places(&self) -> impl Iterator<Item = Place> {
        let sources = self
            .columns
            .iter()
            .filter_map(|(source, _)| source.as_ref());
        sources.map(Source::place).chain([self.dest.place()])
    }

    fn recipe(&mut self) -> PyResult<RowsRecipe<'_>> {
        let columns = self.columns.iter().map(|(source, width_bytes)| {
            Ok(RowsColumn {
                source: source.as_ref().map(Source::bytes).transpose()?,
                width_bytes: *width_bytes,
            })
        });
        Ok(RowsRecipe {
            dest: self.dest.bytes()?,
            rows: self.rows,
            planes: self.planes,
            columns: columns.collect::<PyResult<_>>()?,
        })
    }
}

/// The same exception, naming the recipe.
fn within(py: Python<'_>, index: usize, error: &PyErr) -> PyErr {
    PyErr::from_type(
        error.get_type(py),
        format!("recipe {index}: {}", error.value(py)),
    )
}

/// One recipe, its arrays borrowed.
struct RecipeArgument<'py> {
    dest: Dest<'py>,
    channels: usize,
    element: ElementSize,
    columns: Vec<ColumnArgument<'py>>,
}

impl<'py> RecipeArgument<'py> {
    fn of(recipe: &(Object<'py>, usize, usize, Vec<Bound<'py, PyTuple>>)) -> PyResult<Self> {
        let (dest, channels, element_bytes, columns) = recipe;
        let element = ElementSize::from_bytes(*element_bytes).ok_or_else(|| {
            PyValueError::new_err(format!("elements have 2 or 4 bytes, got {element_bytes}"))
        })?;
        Ok(Self {
            dest: Dest::of(dest)?,
            channels: *channels,
            element,
            columns: columns
                .iter()
                .map(ColumnArgument::of)
                .collect::<PyResult<_>>()?,
        })
    }

    fn places(&self) -> impl Iterator<Item = Place> {
        let sources = self.columns.iter().flat_map(ColumnArgument::sources);
        sources.map(Source::place).chain([self.dest.place()])
    }

    fn recipe(&mut self) -> PyResult<Recipe<'_>> {
        Ok(Recipe {
            dest: self.dest.bytes()?,
            channels: self.channels,
            element: self.element,
            columns: self
                .columns
                .iter()
                .map(ColumnArgument::column)
                .collect::<PyResult<_>>()?,
        })
    }
}

/// One column, its arrays borrowed.
enum ColumnArgument<'py> {
    Fragments {
        source: [Source<'py>; 1],
        source_tiles: usize,
        first: usize,
        count: usize,
    },
    Down {
        tiles: usize,
        sources: Vec<Source<'py>>,
        /// (rank, `rank_begin`).
        places: Vec<[usize; 2]>,
    },
    Up {
        tiles: usize,
        sources: Vec<Source<'py>>,
        /// (`row_begin`, `row_count`, rank, `rank_begin`).
        places: Vec<[usize; 4]>,
    },
    Zero {
        tiles: usize,
    },
    Keep {
        tiles: usize,
    },
}

impl<'py> ColumnArgument<'py> {
    fn of(column: &Bound<'py, PyTuple>) -> PyResult<Self> {
        let tag = column.get_item(0)?;
        match tag.cast::<PyString>()?.to_str()? {
            "fragments" => {
                let (_, source, source_tiles, first, count): (
                    Object<'py>,
                    Object<'py>,
                    usize,
                    usize,
                    usize,
                ) = column.extract()?;
                Ok(Self::Fragments {
                    source: [Source::of(&source)?],
                    source_tiles,
                    first,
                    count,
                })
            }
            "down" => {
                type Member<'py> = (Object<'py>, usize, usize);
                let (_, tiles, members): (Object<'py>, usize, Vec<Member<'py>>) =
                    column.extract()?;
                Ok(Self::Down {
                    tiles,
                    sources: members
                        .iter()
                        .map(|(source, ..)| Source::of(source))
                        .collect::<PyResult<_>>()?,
                    places: members
                        .iter()
                        .map(|&(_, rank, rank_begin)| [rank, rank_begin])
                        .collect(),
                })
            }
            "up" => {
                type Member<'py> = (Object<'py>, usize, usize, usize, usize);
                let (_, tiles, members): (Object<'py>, usize, Vec<Member<'py>>) =
                    column.extract()?;
                Ok(Self::Up {
                    tiles,
                    sources: members
                        .iter()
                        .map(|(source, ..)| Source::of(source))
                        .collect::<PyResult<_>>()?,
                    places: members
                        .iter()
                        .map(|&(_, row_begin, row_count, rank, rank_begin)| {
                            [row_begin, row_count, rank, rank_begin]
                        })
                        .collect(),
                })
            }
            "zero" => {
                let (_, tiles): (Object<'py>, usize) = column.extract()?;
                Ok(Self::Zero { tiles })
            }
            "keep" => {
                let (_, tiles): (Object<'py>, usize) = column.extract()?;
                Ok(Self::Keep { tiles })
            }
            other => Err(PyValueError::new_err(format!(
                "a column is `fragments`, `down`, `up`, `zero` or `keep`, got {other:?}"
            ))),
        }
    }

    fn sources(&self) -> &[Source<'py>] {
        match self {
            Self::Fragments { source, .. } => source,
            Self::Down { sources, .. } | Self::Up { sources, .. } => sources,
            Self::Zero { .. } | Self::Keep { .. } => &[],
        }
    }

    fn column(&self) -> PyResult<Column<'_>> {
        match self {
            Self::Fragments {
                source: [source],
                source_tiles,
                first,
                count,
            } => Ok(Column::Fragments {
                source: source.bytes()?,
                source_tiles: *source_tiles,
                first: *first,
                count: *count,
            }),
            Self::Down {
                tiles,
                sources,
                places,
            } => {
                let members = sources.iter().zip(places);
                let members = members.map(|(source, &[rank, rank_begin])| {
                    Ok(DownMember {
                        source: source.bytes()?,
                        rank,
                        rank_begin,
                    })
                });
                Ok(Column::Down {
                    tiles: *tiles,
                    members: members.collect::<PyResult<_>>()?,
                })
            }
            Self::Up {
                tiles,
                sources,
                places,
            } => {
                let members = sources.iter().zip(places);
                let members = members.map(|(source, &[row_begin, row_count, rank, rank_begin])| {
                    Ok(UpMember {
                        source: source.bytes()?,
                        row_begin,
                        row_count,
                        rank,
                        rank_begin,
                    })
                });
                Ok(Column::Up {
                    tiles: *tiles,
                    members: members.collect::<PyResult<_>>()?,
                })
            }
            Self::Zero { tiles } => Ok(Column::Zero { tiles: *tiles }),
            Self::Keep { tiles } => Ok(Column::Keep { tiles: *tiles }),
        }
    }
}
