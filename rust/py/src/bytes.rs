//! NumPy `uint8` arrays as bytes: borrowed, contiguous, and never two views of one place while one
//! of them is written.

use std::slice;

use numpy::{PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn, PyReadwriteArrayDyn};
use numpy::{PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

/// An array to be read.
pub(crate) struct Source<'py>(PyReadonlyArrayDyn<'py, u8>);

impl<'py> Source<'py> {
    /// Borrows an array until this is dropped.
    pub(crate) fn of(object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let array = array_of(object)?.try_readonly();
        array
            .map(Self)
            .map_err(|e| PyValueError::new_err(format!("a source cannot be read: {e}")))
    }

    /// Its bytes, in C order.
    pub(crate) fn bytes(&self) -> PyResult<&[u8]> {
        Ok(self.0.as_slice()?)
    }

    /// Its bytes, for threads that read them after the call has returned.
    ///
    /// # Safety
    /// The array must be kept until the last use, and nobody may write to its memory meanwhile:
    /// what Python promises for one call, it then promises until these threads are done.
    #[expect(unsafe_code, reason = "bytes are lent beyond a call")]
    pub(crate) unsafe fn lent(&self) -> PyResult<&'static [u8]> {
        let bytes = self.bytes()?;
        let (begin, len) = (bytes.as_ptr(), bytes.len());
        // SAFETY: `begin` and `len` are those of a slice, whose memory the caller keeps.
        Ok(unsafe { slice::from_raw_parts(begin, len) })
    }

    /// The array itself.
    pub(crate) fn array(&self) -> Py<PyAny> {
        self.0.as_any().clone().unbind()
    }

    /// Its place in memory.
    pub(crate) fn place(&self) -> Place {
        Place::of(&self.0, Use::Read)
    }
}

/// An array to be filled.
pub(crate) struct Dest<'py>(PyReadwriteArrayDyn<'py, u8>);

impl<'py> Dest<'py> {
    /// Borrows an array exclusively until this is dropped.
    pub(crate) fn of(object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let array = array_of(object)?.try_readwrite();
        array
            .map(Self)
            .map_err(|e| PyValueError::new_err(format!("a destination cannot be written: {e}")))
    }

    /// Its bytes, in C order.
    pub(crate) fn bytes(&mut self) -> PyResult<&mut [u8]> {
        Ok(self.0.as_slice_mut()?)
    }

    /// Its bytes, for threads that write to them after the call has returned.
    ///
    /// # Safety
    /// The array must be kept until the last use, and nobody may touch its memory meanwhile: what
    /// Python promises for one call, it then promises until these threads are done.
    #[expect(unsafe_code, reason = "bytes are lent beyond a call")]
    pub(crate) unsafe fn lent(&mut self) -> PyResult<&'static mut [u8]> {
        let bytes = self.bytes()?;
        let (begin, len) = (bytes.as_mut_ptr(), bytes.len());
        // SAFETY: `begin` and `len` are those of a slice, whose memory the caller keeps, and leaves
        // to whoever has this one.
        Ok(unsafe { slice::from_raw_parts_mut(begin, len) })
    }

    /// The array itself.
    pub(crate) fn array(&self) -> Py<PyAny> {
        self.0.as_any().clone().unbind()
    }

    /// Its place in memory.
    pub(crate) fn place(&self) -> Place {
        Place::of(&self.0, Use::Write)
    }
}

fn array_of<'a, 'py>(object: &'a Bound<'py, PyAny>) -> PyResult<&'a Bound<'py, PyArrayDyn<u8>>> {
    let array = object.cast::<PyArrayDyn<u8>>().map_err(|_| {
        PyTypeError::new_err(format!(
            "bytes cross as NumPy arrays of uint8, got {}",
            kind_of(object)
        ))
    })?;
    if array.is_c_contiguous() {
        return Ok(array);
    }
    Err(PyValueError::new_err(format!(
        "an array must be contiguous in C order, got shape {:?} with strides {:?}",
        array.shape(),
        array.strides()
    )))
}

fn kind_of(object: &Bound<'_, PyAny>) -> String {
    match object.cast::<PyUntypedArray>() {
        Ok(array) => format!("an array of {}", array.dtype()),
        Err(_) => object
            .get_type()
            .name()
            .map_or_else(|_| "another object".into(), |name| name.to_string()),
    }
}

/// Whether something is written in one place that is used in another.
pub(crate) fn collide(one: &[Place], other: &[Place]) -> bool {
    check_apart([one, other].concat()).is_err()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    Read,
    Write,
}

/// The addresses that an array takes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    begin: usize,
    end: usize,
    purpose: Use,
}

impl Place {
    fn of(array: &Bound<'_, PyArrayDyn<u8>>, purpose: Use) -> Self {
        let begin = array.data().addr();
        let end = begin + array.len();
        Self {
            begin,
            end,
            purpose,
        }
    }
}

/// Checks that what is written is written once and not read.
///
/// NumPy's borrows know the views of one array; two arrays over the memory of one torch tensor are
/// known by their addresses only.
pub(crate) fn check_apart(mut places: Vec<Place>) -> PyResult<()> {
    places.retain(|place| place.begin < place.end);
    places.sort_unstable_by_key(|place| place.begin);
    let (mut written_to, mut used_to) = (0, 0);
    for place in places {
        let limit = match place.purpose {
            Use::Read => written_to,
            Use::Write => used_to,
        };
        if place.begin < limit {
            return Err(PyValueError::new_err(
                "a destination overlaps another destination or a source",
            ));
        }
        used_to = used_to.max(place.end);
        if place.purpose == Use::Write {
            written_to = written_to.max(place.end);
        }
    }
    Ok(())
}
