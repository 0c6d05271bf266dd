//! Matrix products by cuBLASLt, with f32 sums whatever the storage.
//!
//! All matrices are row-major. cuBLASLt is column-major, so it is asked for the transpose:
//! `Cᵀ = op(B)ᵀ·op(A)ᵀ`, which moves nothing. The algorithm is chosen once for a shape and kept;
//! those that sum pieces in an order that may change are not admitted, so a product has the same
//! bits every time.

use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::cublaslt::sys::{
    self, cublasComputeType_t as Compute, cublasLtMatmulDescAttributes_t as Desc,
    cublasLtMatmulPreferenceAttributes_t as Preference, cublasLtMatrixLayoutAttribute_t as Layout,
    cublasStatus_t as Status, cudaDataType_t as Type,
};

use crate::fork::BRANCHES;
use crate::gpu::lock;
use crate::library::{Library, look_for};
use crate::{Error, Gpu, Label, Result};

/// Scratch that cuBLASLt may use, as NVIDIA advises for compute capability 9.0.
const WORKSPACE: usize = 32 << 20;

/// Split sums are put together in f32 by a kernel of their own, in order, or not at all.
const REDUCTION: u32 =
    sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;

/// How numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Number {
    /// 32-bit float.
    F32,
    /// The upper half of an f32.
    BF16,
    /// 16-bit IEEE float.
    F16,
}

impl Number {
    /// Bytes of one.
    pub fn bytes(self) -> usize {
        if self == Number::F32 { 4 } else { 2 }
    }

    /// The define that makes it the `Real` of `types.cuh`.
    pub fn define(self) -> (&'static str, String) {
        let name = match self {
            Number::F32 => "REAL_F32",
            Number::BF16 => "REAL_BF16",
            Number::F16 => "REAL_F16",
        };
        (name, "1".into())
    }

    fn raw(self) -> Type {
        match self {
            Number::F32 => Type::CUDA_R_32F,
            Number::BF16 => Type::CUDA_R_16BF,
            Number::F16 => Type::CUDA_R_16F,
        }
    }
}

/// `c = op(a)·op(b) (+ c) (+ bias)`, row-major: op(a) `[m, k]`, op(b) `[k, n]`, c `[m, n]`.
#[derive(Clone, Copy, Debug)]
pub struct Matmul {
    /// Rows of c.
    pub m: usize,
    /// Columns of c.
    pub n: usize,
    /// The inner size.
    pub k: usize,
    /// Address of a: `[m, k]`, or `[k, m]` when `trans_a`.
    pub a: u64,
    /// Address of b: `[k, n]`, or `[n, k]` when `trans_b`.
    pub b: u64,
    /// Address of c.
    pub c: u64,
    /// Whether a is stored transposed.
    pub trans_a: bool,
    /// Whether b is stored transposed (weights `[O, I]` are).
    pub trans_b: bool,
    /// Storage of a and b.
    pub input: Number,
    /// Storage of c: f32, or the inputs'.
    pub output: Number,
    /// Whether the product is added to what c holds.
    pub add: bool,
    /// Address of n numbers stored like c that are added to every row; 0 for none.
    pub bias: u64,
    /// Elements between rows of a, b and c as stored; 0 for as many as a row has.
    pub rows_apart: [usize; 3],
    /// How many products, and elements between the matrices of a, b and c.
    pub batch: (usize, [usize; 3]),
}

impl Matmul {
    /// `c = a·b` of one storage type, nothing transposed, nothing added.
    pub fn new([m, n, k]: [usize; 3], number: Number, a: u64, b: u64, c: u64) -> Self {
        Matmul {
            m,
            n,
            k,
            a,
            b,
            c,
            trans_a: false,
            trans_b: false,
            input: number,
            output: number,
            add: false,
            bias: 0,
            rows_apart: [0; 3],
            batch: (1, [0; 3]),
        }
    }
}

/// Plans that are kept; a server meets prompts of every length, each with its own.
const MOST_PLANS: usize = 4096;

/// What the choice of an algorithm depends on.
#[derive(PartialEq, Eq, Hash)]
struct Kind {
    sizes: [usize; 3],
    apart: [usize; 3],
    batch: (usize, [usize; 3]),
    transposed: [bool; 2],
    numbers: [Number; 2],
    add: bool,
    bias: bool,
    alignment: [u32; 3],
    /// Whether it may run beside others, with a share of the scratch.
    beside: bool,
}

impl Kind {
    fn workspace(&self) -> usize {
        if self.beside { WORKSPACE / BRANCHES } else { WORKSPACE }
    }
}

/// The library's handle, its scratch, and the choices made so far.
pub(crate) struct Blas {
    handle: sys::cublasLtHandle_t,
    /// Scratch in the pool of the `Gpu`, and freed with it.
    workspace: u64,
    plans: HashMap<Kind, Plan>,
}

/// Descriptors and algorithm of a kind of product; made once and kept as long as the handle.
struct Plan {
    desc: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algo: sys::cublasLtMatmulAlgo_t,
}

// SAFETY: the handle and the descriptors may be used from any thread; they are behind a lock.
unsafe impl Send for Blas {}

impl Blas {
    /// # Safety
    /// Nothing is using it any more.
    pub(crate) unsafe fn destroy(self) {
        // SAFETY: promised by the caller; each is destroyed once.
        unsafe {
            for plan in self.plans.values() {
                plan.destroy();
            }
            sys::cublasLtDestroy(self.handle);
        }
    }
}

impl Plan {
    unsafe fn destroy(&self) {
        // SAFETY: promised by the caller; handles that were not made are null.
        unsafe {
            if !self.desc.is_null() {
                sys::cublasLtMatmulDescDestroy(self.desc);
            }
            for layout in self.layouts.iter().filter(|l| !l.is_null()) {
                sys::cublasLtMatrixLayoutDestroy(*layout);
            }
        }
    }
}

impl Gpu {
    /// Multiplies matrices. f32 inputs are multiplied in f32, not rounded to TF32.
    ///
    /// # Safety
    /// The addresses hold matrices of the sizes said; c overlaps neither a nor b.
    pub unsafe fn matmul(&self, product: &Matmul) -> Result<()> {
        let p = product;
        if p.m == 0 || p.n == 0 || p.batch.0 == 0 {
            return Ok(());
        }
        if p.output != Number::F32 && p.output != p.input {
            let (input, output) = (p.input, p.output);
            return Err(Error::Value(format!(
                "a product of {input:?} is stored as f32 or {input:?}, not {output:?}"
            )));
        }
        if p.k == 0 {
            return self.empty_sum(p);
        }
        let mut held = self.blas()?;
        let Some(blas) = &mut *held else {
            return Err(Error::Value("cuBLASLt has been given back".into()));
        };
        let branch = self.branch();
        let alignment = |ptr: u64| 1u32 << ptr.trailing_zeros().min(8);
        let kind = Kind {
            sizes: [p.m, p.n, p.k],
            apart: p.rows_apart,
            batch: p.batch,
            transposed: [p.trans_a, p.trans_b],
            numbers: [p.input, p.output],
            add: p.add,
            bias: p.bias != 0,
            alignment: [p.a, p.b, p.c].map(alignment),
            beside: branch.is_some(),
        };
        let share = kind.workspace();
        let handle = blas.handle;
        if blas.plans.len() >= MOST_PLANS && !blas.plans.contains_key(&kind) {
            // A size that comes again is planned again, alike. Products in flight need none of it.
            for (_, plan) in blas.plans.drain() {
                // SAFETY: nobody else has it, and the lock is held.
                unsafe { plan.destroy() };
            }
        }
        let plan = match blas.plans.entry(kind) {
            std::collections::hash_map::Entry::Occupied(plan) => plan.into_mut(),
            std::collections::hash_map::Entry::Vacant(free) => {
                let plan = make_plan(handle, p, free.key())?;
                free.insert(plan)
            }
        };
        let (one, beta) = (1f32, if p.add { 1f32 } else { 0f32 });
        // SAFETY: the addresses are promised by the caller, the descriptors fit them, and the
        // scratch is used in the stream's order.
        unsafe {
            if p.bias != 0 {
                set(plan.desc, Desc::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p.bias)?;
            }
            self.timed(
                || product_name(p),
                || {
                    let result = sys::cublasLtMatmul(
                        handle,
                        plan.desc,
                        (&raw const one).cast(),
                        p.b as *const c_void,
                        plan.layouts[0],
                        p.a as *const c_void,
                        plan.layouts[1],
                        (&raw const beta).cast(),
                        p.c as *const c_void,
                        plan.layouts[2],
                        p.c as *mut c_void,
                        plan.layouts[2],
                        &plan.algo,
                        (blas.workspace + (branch.unwrap_or(0) * share) as u64) as *mut c_void,
                        share,
                        self.stream().cast(),
                    );
                    status("cublasLtMatmul", result, p)
                },
            )
        }
    }

    /// The library, started when first needed.
    fn blas(&self) -> Result<std::sync::MutexGuard<'_, Option<Blas>>> {
        let mut held = lock(&self.0.blas);
        self.bind()?;
        if held.is_none() {
            look_for(Library::CublasLt)?;
            let mut handle = std::ptr::null_mut();
            // SAFETY: the library is loaded and the context current.
            let result = unsafe { sys::cublasLtCreate(&mut handle) };
            if result != Status::CUBLAS_STATUS_SUCCESS {
                let reason = format!("{result:?}");
                return Err(Error::Call { call: "cublasLtCreate", reason });
            }
            let label = Label::new("the workspace of matrix products");
            // On the side, since a graph may be being captured, and not only for that graph.
            let workspace = self.take_from_pool(WORKSPACE, self.0.side, label)?;
            // SAFETY: the side stream is alive and never captured.
            let result = unsafe { cudarc::driver::sys::cuStreamSynchronize(self.0.side) };
            crate::error::check("cuStreamSynchronize", result)?;
            lock(&self.0.books).enter(workspace, WORKSPACE as u64, label);
            *held = Some(Blas { handle, workspace, plans: HashMap::new() });
        }
        Ok(held)
    }

    /// With nothing to sum, c is zero or what it was.
    fn empty_sum(&self, p: &Matmul) -> Result<()> {
        if p.add && p.bias == 0 {
            return Ok(());
        }
        if p.bias != 0 || p.rows_apart[2] != 0 || p.batch.0 != 1 {
            return Err(Error::Value(
                "a product with no inner size takes no bias, gaps or batch".into(),
            ));
        }
        // SAFETY: c has m·n numbers, as promised to `matmul`.
        unsafe { self.fill_at(p.c, 0, p.m * p.n * p.output.bytes()) }
    }
}

fn status(call: &'static str, result: Status, p: &Matmul) -> Result<()> {
    if result == Status::CUBLAS_STATUS_SUCCESS {
        return Ok(());
    }
    Err(Error::Call { call, reason: format!("{result:?}: {}", product_name(p)) })
}

fn product_name(p: &Matmul) -> String {
    let transposed = |t: bool| if t { "ᵀ" } else { "" };
    let (a, b, add) =
        (transposed(p.trans_a), transposed(p.trans_b), if p.add { "+=" } else { "=" });
    let (Matmul { m, n, k, input, output, .. }, times) = (p, p.batch.0);
    format!("[{m}, {n}] {output:?} {add} a{a}·b{b} over {k} {input:?}, {times} times")
}

/// Sets an attribute of a product.
///
/// # Safety
/// The attribute's type is `T`.
unsafe fn set<T>(desc: sys::cublasLtMatmulDesc_t, which: Desc, value: &T) -> Result<()> {
    // SAFETY: promised by the caller.
    let result = unsafe {
        sys::cublasLtMatmulDescSetAttribute(desc, which, (&raw const *value).cast(), size_of::<T>())
    };
    if result == Status::CUBLAS_STATUS_SUCCESS {
        return Ok(());
    }
    Err(Error::Call { call: "cublasLtMatmulDescSetAttribute", reason: format!("{result:?}") })
}

fn make_plan(handle: sys::cublasLtHandle_t, p: &Matmul, kind: &Kind) -> Result<Plan> {
    let mut plan = Plan {
        desc: std::ptr::null_mut(),
        layouts: [std::ptr::null_mut(); 3],
        algo: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
    };
    // SAFETY: attributes are given with their types; handles are written before use.
    let outcome = unsafe { fill_plan(handle, &mut plan, p, kind) };
    if let Err(e) = outcome {
        // SAFETY: nothing has used the plan.
        unsafe { plan.destroy() };
        return Err(e);
    }
    Ok(plan)
}

unsafe fn fill_plan(
    handle: sys::cublasLtHandle_t,
    plan: &mut Plan,
    p: &Matmul,
    kind: &Kind,
) -> Result<()> {
    // SAFETY: see `make_plan`.
    unsafe {
        let result = sys::cublasLtMatmulDescCreate(
            &mut plan.desc,
            Compute::CUBLAS_COMPUTE_32F,
            Type::CUDA_R_32F,
        );
        status("cublasLtMatmulDescCreate", result, p)?;
        // The library's A is our b and its B our a; see the top of this file.
        let transpose = |t: bool| i32::from(t);
        set(plan.desc, Desc::CUBLASLT_MATMUL_DESC_TRANSA, &transpose(p.trans_b))?;
        set(plan.desc, Desc::CUBLASLT_MATMUL_DESC_TRANSB, &transpose(p.trans_a))?;
        if p.bias != 0 {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32;
            set(plan.desc, Desc::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
            set(plan.desc, Desc::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p.bias)?;
            let stored = p.output.raw() as i32;
            set(plan.desc, Desc::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &stored)?;
        }
        let stored = |rows: usize, cols: usize, swapped: bool| {
            if swapped { (cols, rows) } else { (rows, cols) }
        };
        let (b_rows, b_cols) = stored(p.k, p.n, p.trans_b);
        let (a_rows, a_cols) = stored(p.m, p.k, p.trans_a);
        let [a_apart, b_apart, c_apart] = p.rows_apart;
        let [a_step, b_step, c_step] = p.batch.1;
        let matrices = [
            (p.input, b_rows, b_cols, b_apart, b_step),
            (p.input, a_rows, a_cols, a_apart, a_step),
            (p.output, p.m, p.n, c_apart, c_step),
        ];
        for (layout, (number, rows, cols, apart, step)) in plan.layouts.iter_mut().zip(matrices) {
            let leading = if apart == 0 { cols } else { apart };
            let result = sys::cublasLtMatrixLayoutCreate(
                layout,
                number.raw(),
                cols as u64,
                rows as u64,
                leading as i64,
            );
            status("cublasLtMatrixLayoutCreate", result, p)?;
            if p.batch.0 > 1 {
                let (count, step) = (p.batch.0 as i32, step as i64);
                let which = Layout::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT;
                let result = sys::cublasLtMatrixLayoutSetAttribute(
                    *layout,
                    which,
                    (&raw const count).cast(),
                    4,
                );
                status("cublasLtMatrixLayoutSetAttribute", result, p)?;
                let which = Layout::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET;
                let result = sys::cublasLtMatrixLayoutSetAttribute(
                    *layout,
                    which,
                    (&raw const step).cast(),
                    8,
                );
                status("cublasLtMatrixLayoutSetAttribute", result, p)?;
            }
        }
        plan.algo = choose(handle, plan, p, kind)?;
        Ok(())
    }
}

unsafe fn choose(
    handle: sys::cublasLtHandle_t,
    plan: &Plan,
    p: &Matmul,
    kind: &Kind,
) -> Result<sys::cublasLtMatmulAlgo_t> {
    struct Wishes(sys::cublasLtMatmulPreference_t);
    impl Drop for Wishes {
        fn drop(&mut self) {
            // SAFETY: made below and destroyed once.
            unsafe { sys::cublasLtMatmulPreferenceDestroy(self.0) };
        }
    }
    // SAFETY: attributes are given with their sizes; the plan's descriptors are complete.
    unsafe {
        let mut wishes = std::ptr::null_mut();
        let result = sys::cublasLtMatmulPreferenceCreate(&mut wishes);
        status("cublasLtMatmulPreferenceCreate", result, p)?;
        let wishes = Wishes(wishes);
        let wish = |which, value: *const c_void, bytes| {
            let result = sys::cublasLtMatmulPreferenceSetAttribute(wishes.0, which, value, bytes);
            status("cublasLtMatmulPreferenceSetAttribute", result, p)
        };
        let most = kind.workspace() as u64;
        wish(Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (&raw const most).cast(), 8)?;
        let (which, reduction) =
            (Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, REDUCTION);
        wish(which, (&raw const reduction).cast(), 4)?;
        let [a, b, c] = &kind.alignment;
        for (which, bytes) in [
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, b),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, a),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, c),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, c),
        ] {
            wish(which, (&raw const *bytes).cast(), 4)?;
        }
        let mut found: sys::cublasLtMatmulHeuristicResult_t = std::mem::zeroed();
        let mut count = 0;
        let [b, a, c] = plan.layouts;
        let result = sys::cublasLtMatmulAlgoGetHeuristic(
            handle, plan.desc, b, a, c, c, wishes.0, 1, &mut found, &mut count,
        );
        status("cublasLtMatmulAlgoGetHeuristic", result, p)?;
        if count == 0 {
            status("cublasLtMatmulAlgoGetHeuristic", Status::CUBLAS_STATUS_NOT_SUPPORTED, p)?;
        }
        Ok(found.algo)
    }
}
