//! `Watch`: whether a model's modules and tensors are where they were.
//!
//! Called for thousands of modules and tensors at the begin and the end of every change. What it
//! costs is memory that has left the caches, hence loops that touch one thing each.

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// The children of one module.
struct Children {
    owner: Owner,
    count: usize,
}

/// The dictionary of a module's modules, unless the module is of an unusual kind.
enum Owner {
    Dict(Py<PyDict>),
    Mapping(Py<PyAny>),
}

impl Owner {
    fn new(owner: Bound<'_, PyAny>) -> Self {
        // A subclass may have an order of its own.
        match owner.cast_into_exact::<PyDict>() {
            Ok(dict) => Self::Dict(dict.unbind()),
            Err(other) => Self::Mapping(other.into_inner().unbind()),
        }
    }

    fn values<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        match self {
            Self::Dict(dict) => Ok(dict.bind(py).iter().map(|(_, value)| value).collect()),
            Self::Mapping(other) => {
                let values = other.bind(py).call_method0(intern!(py, "values"))?;
                values.try_iter()?.collect()
            }
        }
    }

    /// Whether these are the values, in this order.
    fn holds(&self, py: Python<'_>, expected: &[Py<PyAny>]) -> PyResult<bool> {
        if let Self::Dict(dict) = self {
            let dict = dict.bind(py);
            let mut pairs = dict.iter().zip(expected);
            return Ok(dict.len() == expected.len() && pairs.all(|((_, own), one)| own.is(one)));
        }
        let values = self.values(py)?;
        let mut pairs = values.iter().zip(expected);
        Ok(values.len() == expected.len() && pairs.all(|(own, one)| own.is(one)))
    }

    fn visit(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        match self {
            Self::Dict(dict) => visit.call(dict),
            Self::Mapping(other) => visit.call(other),
        }
    }
}

/// A tensor's name in a module.
struct Place {
    owner: Py<PyDict>,
    name: Py<PyAny>,
}

impl Place {
    fn get<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let found = self.owner.bind(py).get_item(self.name.bind(py))?;
        Ok(found.filter(|tensor| !tensor.is_none()))
    }
}

/// The buffers of one module, and how many there were.
struct Buffers {
    owner: Py<PyDict>,
    count: usize,
}

/// Which tensor was at a place, and where its elements were; 0 where there was none.
///
/// The tensor is not kept alive. One that took the address of one that is gone has its memory, too,
/// or is told by that.
#[derive(Default, PartialEq, Eq)]
struct Seen {
    tensor: usize,
    elements: usize,
}

/// Modules and tensors of a model, as they were when they were looked at.
#[pyclass(module = "qwenlora._core")]
pub(crate) struct Watch {
    children: Vec<Children>,
    /// The children of all, one after another.
    modules: Vec<Py<PyAny>>,
    /// The parameters, and behind them the buffers that were there.
    places: Vec<Place>,
    parameter_count: usize,
    buffers: Vec<Buffers>,
    seen: Vec<Seen>,
    /// How often each parameter was written to in place; None where it does not count.
    versions: Vec<Option<u64>>,
}

#[pymethods]
impl Watch {
    /// Takes modules' `_modules`, which hold what they should; places of parameters as (`_parameters`,
    /// name); and modules' `_buffers`. Tensors are taken as they are now.
    #[new]
    fn new(
        py: Python<'_>,
        children: Vec<Bound<'_, PyAny>>,
        parameters: Vec<(Py<PyDict>, Py<PyAny>)>,
        buffers: Vec<Py<PyDict>>,
    ) -> PyResult<Self> {
        let mut own = Vec::with_capacity(children.len());
        let mut modules = Vec::new();
        for owner in children {
            let owner = Owner::new(owner);
            let values = owner.values(py)?;
            let count = values.len();
            modules.extend(values.into_iter().map(Bound::unbind));
            own.push(Children { owner, count });
        }
        let places: Vec<Place> = parameters
            .into_iter()
            .map(|(owner, name)| Place { owner, name })
            .collect();
        let buffers = buffers
            .into_iter()
            .map(|owner| Buffers { owner, count: 0 })
            .collect();
        let mut watch = Self {
            children: own,
            modules,
            parameter_count: places.len(),
            places,
            buffers,
            seen: Vec::new(),
            versions: Vec::new(),
        };
        watch.look(py)?;
        Ok(watch)
    }

    /// Takes the tensors as they are now for those that were left there.
    fn look(&mut self, py: Python<'_>) -> PyResult<()> {
        self.places.truncate(self.parameter_count);
        for buffers in &mut self.buffers {
            let owner = buffers.owner.bind(py);
            buffers.count = owner.len();
            if buffers.count > 0 {
                self.places.extend(owner.iter().map(|(name, _)| Place {
                    owner: owner.clone().unbind(),
                    name: name.unbind(),
                }));
            }
        }
        let tensors = self.places.iter().map(|place| place.get(py));
        let tensors = tensors.collect::<PyResult<Vec<_>>>()?;
        let seen = tensors.iter().map(|tensor| {
            Ok(Seen {
                tensor: tensor.as_ref().map_or(0, address_of),
                elements: tensor.as_ref().map_or(Ok(0), elements_of)?,
            })
        });
        let seen = seen.collect::<PyResult<_>>()?;
        let before = std::mem::replace(&mut self.seen, seen);
        let known = before.iter().zip(&self.versions).map(Some);
        let known = known.chain(std::iter::repeat(None));
        let parameters = tensors.iter().take(self.parameter_count).zip(known);
        let versions = parameters.map(|(tensor, known)| {
            let tensor = tensor.as_ref()?;
            match known.filter(|(seen, _)| seen.tensor == address_of(tensor)) {
                // To ask a tensor that does not count is slow.
                Some((_, None)) => None,
                Some(_) => version_of(tensor),
                None => counts(tensor).then(|| version_of(tensor)).flatten(),
            }
        });
        self.versions = versions.collect();
        Ok(())
    }

    /// The numbers of the parameters that are still there and were written to in place meanwhile.
    fn rewritten(&self, py: Python<'_>) -> PyResult<Vec<usize>> {
        let mut found = Vec::new();
        let own = self.places.iter().zip(&self.seen).zip(&self.versions);
        for (at, ((place, seen), version)) in own.enumerate() {
            if version.is_none() {
                continue;
            }
            let Some(tensor) = place.get(py)? else {
                continue;
            };
            let is_there = address_of(&tensor) == seen.tensor;
            // One that took the address of one that is gone has its elements elsewhere.
            if is_there && version_of(&tensor) != *version && elements_of(&tensor)? == seen.elements
            {
                found.push(at);
            }
        }
        Ok(found)
    }

    /// Whether every module, and every tensor, is where it was.
    fn is_unchanged(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(self.has_modules(py)? && self.has_tensors(py)?)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        for children in &self.children {
            children.owner.visit(&visit)?;
        }
        for module in &self.modules {
            visit.call(module)?;
        }
        for place in &self.places {
            visit.call(&place.owner)?;
        }
        for buffers in &self.buffers {
            visit.call(&buffers.owner)?;
        }
        Ok(())
    }

    fn __clear__(&mut self) {
        self.children.clear();
        self.modules.clear();
        self.places.clear();
        self.buffers.clear();
    }
}

impl Watch {
    fn has_modules(&self, py: Python<'_>) -> PyResult<bool> {
        let mut rest = self.modules.as_slice();
        for children in &self.children {
            let (own, others) = rest.split_at(children.count);
            if !children.owner.holds(py, own)? {
                return Ok(false);
            }
            rest = others;
        }
        Ok(true)
    }

    fn has_tensors(&self, py: Python<'_>) -> PyResult<bool> {
        let mut buffers = self.buffers.iter();
        if !buffers.all(|own| own.owner.bind(py).len() == own.count) {
            return Ok(false);
        }
        let mut tensors = Vec::with_capacity(self.places.len());
        for (place, seen) in self.places.iter().zip(&self.seen) {
            let tensor = place.get(py)?;
            if tensor.as_ref().map_or(0, address_of) != seen.tensor {
                return Ok(false);
            }
            tensors.push(tensor);
        }
        for (tensor, seen) in tensors.iter().zip(&self.seen) {
            if tensor.as_ref().map_or(Ok(0), elements_of)? != seen.elements {
                return Ok(false);
            }
        }
        Ok(self.places.len() == self.seen.len())
    }
}

/// Its `id` in Python.
fn address_of(object: &Bound<'_, PyAny>) -> usize {
    object.as_ptr().addr()
}

/// Whether a tensor counts how often it is written to; one made in inference mode does not.
fn counts(tensor: &Bound<'_, PyAny>) -> bool {
    let inference = tensor.call_method0(intern!(tensor.py(), "is_inference"));
    inference
        .and_then(|found| found.is_truthy())
        .is_ok_and(|found| !found)
}

/// How often a tensor was written to in place; None where it does not count.
fn version_of(tensor: &Bound<'_, PyAny>) -> Option<u64> {
    let version = tensor.getattr(intern!(tensor.py(), "_version"));
    version.and_then(|version| version.extract()).ok()
}

fn elements_of(tensor: &Bound<'_, PyAny>) -> PyResult<usize> {
    let address = tensor.call_method0(intern!(tensor.py(), "data_ptr"))?;
    address.extract()
}
