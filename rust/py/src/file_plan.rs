//! `FilePlan`: a frozen view of one file's plan.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use qwenlora_core::dtype::Dtype;
use qwenlora_core::key::table::RawTensor;
use qwenlora_core::plan::FilePlan as CorePlan;
use qwenlora_core::plan::config::SourceIdentity;
use qwenlora_core::source::FileIdentity;

use crate::error;

/// (size in bytes, mtime in ns, volume, file id).
type IdentityTuple = (u64, i128, u64, u64);
/// Identities of the weights, and of PEFT's configuration beside them.
pub(crate) type SourceTuple = (IdentityTuple, Option<IdentityTuple>);
/// (key, dtype, shape, length in bytes).
type TensorTuple = (String, String, Vec<u64>, u64);

fn tuple_of(identity: &FileIdentity) -> IdentityTuple {
    (
        identity.size_bytes(),
        identity.mtime_ns(),
        identity.volume(),
        identity.file_id(),
    )
}

pub(crate) fn source_tuple(identity: &SourceIdentity) -> SourceTuple {
    (
        tuple_of(&identity.weights),
        identity.config.as_ref().map(tuple_of),
    )
}

/// Identity of a LoRA file or PEFT folder, as it is now.
#[pyfunction]
pub(crate) fn file_identity(py: Python<'_>, path: PathBuf) -> PyResult<SourceTuple> {
    let identity = py.detach(|| SourceIdentity::of(&path));
    identity
        .map(|identity| source_tuple(&identity))
        .map_err(|e| error::from_plan(py, &e))
}

/// One file, understood without a model.
#[pyclass(frozen, module = "qwenlora._core")]
pub(crate) struct FilePlan {
    pub(crate) core: Arc<CorePlan>,
}

impl From<CorePlan> for FilePlan {
    fn from(core: CorePlan) -> Self {
        let core = Arc::new(core);
        Self { core }
    }
}

#[pymethods]
impl FilePlan {
    /// Reads a file's header and stored scalars.
    #[staticmethod]
    fn read(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let core = py.detach(|| CorePlan::read(&path));
        core.map(Self::from).map_err(|e| error::from_plan(py, &e))
    }

    /// Plans tensors in memory. `same` tells if two of one dtype and shape, by their indices, are
    /// equal.
    #[staticmethod]
    #[pyo3(signature = (origin, tensors, *, scalars, metadata, same))]
    fn from_tensors(
        py: Python<'_>,
        origin: &str,
        tensors: Vec<TensorTuple>,
        scalars: Vec<Option<f64>>,
        metadata: Vec<(String, String)>,
        same: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        let raw = tensors
            .into_iter()
            .map(|(key, dtype, shape, len_bytes)| {
                let dtype = Dtype::parse(&dtype).ok_or_else(|| {
                    PyValueError::new_err(format!("`{key}` has unknown dtype: {dtype}"))
                })?;
                Ok(RawTensor {
                    key,
                    dtype,
                    shape,
                    offset_bytes: 0,
                    len_bytes,
                })
            })
            .collect::<PyResult<Vec<_>>>()?;
        let mut failure = None;
        let compare = |index: usize, original: usize| {
            let answer = same.call1((index, original)).and_then(|own| own.extract());
            answer.unwrap_or_else(|error| {
                failure.get_or_insert(error);
                false
            })
        };
        let core = CorePlan::from_compared_tensors(origin, raw, &scalars, metadata, compare);
        match failure {
            Some(error) => Err(error),
            None => core.map(Self::from).map_err(|e| error::from_plan(py, &e)),
        }
    }

    /// The plan as one line of JSON.
    fn to_json(&self, py: Python<'_>) -> String {
        py.detach(|| self.core.to_json())
    }

    /// Identity of the file that was read, `None` for tensors in memory.
    #[getter]
    fn identity(&self) -> Option<SourceTuple> {
        self.core.identity().map(source_tuple)
    }

    /// `apply`, `partial` or `reject`.
    #[getter]
    fn verdict(&self) -> &'static str {
        self.core.verdict().name()
    }

    /// Why the verdict is not `apply`.
    #[getter]
    fn reason(&self) -> Option<String> {
        self.core.reason()
    }

    /// Remarks that change no verdict.
    #[getter]
    fn notes(&self) -> Vec<String> {
        self.core.notes().to_vec()
    }

    /// Which program wrote the file, and how that is known.
    #[getter]
    fn producer(&self) -> String {
        qwenlora_keys::producer(&self.core)
    }

    /// Size of the file or of the tensors.
    #[getter]
    fn size_bytes(&self) -> u64 {
        self.core.size_bytes()
    }

    fn __repr__(&self) -> String {
        let path = self
            .core
            .path()
            .map_or_else(|| "tensors".into(), |p| p.display().to_string());
        format!("<FilePlan of {path}: {}>", self.core.verdict().name())
    }
}
