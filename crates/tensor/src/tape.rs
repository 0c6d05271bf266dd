//! The tape: what was computed from what, and how to walk back.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::backward::Backward;
use crate::{DType, Error, Grads, Result, Tensor};

/// Where a variable's gradient goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// Nowhere.
    Constant,
    /// Into a slot of [`Grads`].
    Param(usize),
    /// Back into the op of this tape that made it; the number counts the tape's values.
    Value { tape: u64, index: usize },
}

/// A tensor and where its gradient goes. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Var {
    value: Tensor,
    source: Source,
}

impl Var {
    /// The numbers.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// Sizes of the dimensions.
    pub fn shape(&self) -> &[usize] {
        self.value.shape()
    }

    /// How the numbers are stored.
    pub fn dtype(&self) -> DType {
        self.value.dtype()
    }

    /// The same variable under another shape of as many elements; costs nothing. Not for
    /// parameters, whose gradients have one shape.
    pub fn reshape(&self, shape: &[usize]) -> Result<Var> {
        if matches!(self.source, Source::Param(_)) && shape != self.shape() {
            return Err(Error::Tape("a parameter cannot be reshaped; reshape what is made of it"));
        }
        Ok(Var { value: self.value.reshape(shape)?, source: self.source })
    }

    pub(crate) fn source(&self) -> Source {
        self.source
    }

    pub(crate) fn wants_grad(&self) -> bool {
        self.source != Source::Constant
    }
}

type BackwardFn<'a> = Box<dyn FnOnce(Vec<Option<Tensor>>, &mut Backward) -> Result<()> + 'a>;

/// One recorded op: its outputs are the values from `first` on, one for each of `shapes`.
struct Node<'a> {
    first: usize,
    shapes: Vec<Vec<usize>>,
    backward: BackwardFn<'a>,
}

impl Node<'_> {
    fn makes(&self, index: usize) -> bool {
        (self.first..self.first + self.shapes.len()).contains(&index)
    }
}

/// Records ops for [`Tape::backward`], or, as [`Tape::inference`], nothing at all. `'a` is the
/// life of what recomputed functions borrow, usually the model.
pub struct Tape<'a> {
    id: u64,
    recording: bool,
    values: usize,
    nodes: Vec<Node<'a>>,
}

impl<'a> Tape<'a> {
    /// A tape that records.
    pub fn recording() -> Self {
        Self::new(true)
    }

    /// A tape that does not: values only, nothing is kept.
    pub fn inference() -> Self {
        Self::new(false)
    }

    fn new(recording: bool) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Tape { id, recording, values: 0, nodes: Vec::new() }
    }

    /// A constant: no gradient.
    pub fn leaf(&self, value: Tensor) -> Var {
        Var { value, source: Source::Constant }
    }

    /// A parameter, f32 or bf16; its gradient is added into slot `slot` of [`Grads`].
    pub fn param(&self, value: Tensor, slot: usize) -> Var {
        let source = if self.recording { Source::Param(slot) } else { Source::Constant };
        Var { value, source }
    }

    /// A value of this tape that no op made; its gradient is asked for by the recompute op.
    fn input(&mut self, value: Tensor) -> Var {
        let source = Source::Value { tape: self.id, index: self.values };
        self.values += 1;
        Var { value, source }
    }

    /// Refuses variables of another tape, whose gradients would be lost without a word.
    fn check(&self, inputs: &[&Var]) -> Result<()> {
        for var in inputs {
            if let Source::Value { tape, .. } = var.source
                && tape != self.id
            {
                return Err(Error::Tape(
                    "a variable of another tape was used; pass it to recompute as an input",
                ));
            }
        }
        Ok(())
    }

    /// Whether an op on `inputs` needs to keep anything for its backward.
    pub(crate) fn keeps(&self, inputs: &[&Var]) -> bool {
        self.recording && inputs.iter().any(|v| v.wants_grad())
    }

    /// Registers an op with one output. `backward` takes the output's gradient, in the output's
    /// storage type.
    pub(crate) fn record(
        &mut self,
        output: Tensor,
        inputs: &[&Var],
        backward: impl FnOnce(Tensor, &mut Backward) -> Result<()> + 'a,
    ) -> Result<Var> {
        let mut outputs = self.record_many(vec![output], inputs, |grads, b| {
            match grads.into_iter().next().flatten() {
                Some(grad) => backward(grad, b),
                None => Ok(()),
            }
        })?;
        outputs.pop().ok_or(Error::Tape("an op without output"))
    }

    /// Registers an op with several outputs; gradients of outputs that the loss does not reach
    /// are `None`. When none is reached, `backward` is not called.
    pub(crate) fn record_many(
        &mut self,
        outputs: Vec<Tensor>,
        inputs: &[&Var],
        backward: impl FnOnce(Vec<Option<Tensor>>, &mut Backward) -> Result<()> + 'a,
    ) -> Result<Vec<Var>> {
        self.check(inputs)?;
        if !self.keeps(inputs) {
            return Ok(outputs.into_iter().map(|value| self.leaf(value)).collect());
        }
        Ok(self.push(outputs, backward))
    }

    fn push(
        &mut self,
        outputs: Vec<Tensor>,
        backward: impl FnOnce(Vec<Option<Tensor>>, &mut Backward) -> Result<()> + 'a,
    ) -> Vec<Var> {
        let shapes = outputs.iter().map(|value| value.shape().to_vec()).collect();
        self.nodes.push(Node { first: self.values, shapes, backward: Box::new(backward) });
        outputs.into_iter().map(|value| self.input(value)).collect()
    }

    /// Adds the gradients of `loss` (one element) into `grads` and empties the tape; what each
    /// op saved is freed as soon as it has been used.
    pub fn backward(&mut self, loss: &Var, grads: &mut Grads) -> Result<()> {
        self.backward_scaled(loss, 1.0, grads)
    }

    /// As [`Tape::backward`] of `scale · loss`.
    pub fn backward_scaled(&mut self, loss: &Var, scale: f32, grads: &mut Grads) -> Result<()> {
        if loss.value.len() != 1 {
            return Err(Error::shape("backward", "the loss", "one element", loss.shape()));
        }
        let seed = Tensor::scalar_on(&loss.value.device(), scale)?.reshape(loss.shape())?;
        self.backward_from(&[(loss, seed)], grads)
    }

    /// As [`Tape::backward`], from gradients that were found elsewhere: adds the gradients of
    /// `Σᵢ ⟨gᵢ, yᵢ⟩` over the pairs (yᵢ, gᵢ), each g of its y's shape. A gradient is converted
    /// to its output's type and moved to its device. Constants among the outputs are passed over.
    pub fn backward_from(&mut self, outputs: &[(&Var, Tensor)], grads: &mut Grads) -> Result<()> {
        if !self.recording {
            return Err(Error::Tape("backward on a tape that does not record"));
        }
        for (output, gradient) in outputs {
            self.check(&[output])?;
            if gradient.shape() != output.shape() {
                let expected = format!("{:?} like the output", output.shape());
                return Err(Error::shape("backward", "a gradient", expected, gradient.shape()));
            }
            if let Source::Value { index, .. } = output.source
                && !self.nodes.iter().any(|node| node.makes(index))
            {
                return Err(Error::Tape("backward was already run through this output"));
            }
        }
        let mut walk = Backward::new(self.id, self.values, grads);
        for (output, gradient) in outputs {
            let gradient = gradient.to_dtype(output.dtype())?;
            walk.give(output.source, gradient.to_device(&output.value.device())?)?;
        }
        self.walk_back(&mut walk)
    }

    fn walk_back(&mut self, walk: &mut Backward) -> Result<()> {
        while let Some(node) = self.nodes.pop() {
            let mut grads = Vec::with_capacity(node.shapes.len());
            for (i, shape) in node.shapes.iter().enumerate() {
                let grad = walk.take(Source::Value { tape: self.id, index: node.first + i });
                // A variable may have been used under another shape.
                grads.push(match grad {
                    Some(grad) if grad.shape() != shape => Some(grad.reshape(shape)?),
                    grad => grad,
                });
            }
            if grads.iter().any(Option::is_some) {
                (node.backward)(grads, walk)?;
            }
        }
        Ok(())
    }

    /// Runs `f` without recording, and again, recording, when the walk back reaches it: only
    /// `inputs` and the outputs are kept in between. `f` must be a pure function of its inputs,
    /// and must get every variable through them (parameters it may make itself).
    pub fn recompute(
        &mut self,
        inputs: &[Var],
        f: impl Fn(&mut Tape<'a>, &[Var]) -> Result<Vec<Var>> + 'a,
    ) -> Result<Vec<Var>> {
        if !self.recording {
            return f(self, inputs);
        }
        let references: Vec<&Var> = inputs.iter().collect();
        self.check(&references)?;
        let mut dry = Tape::inference();
        let constants: Vec<Var> = inputs.iter().map(|v| dry.leaf(v.value.clone())).collect();
        let outputs: Vec<Tensor> = f(&mut dry, &constants)?.into_iter().map(|v| v.value).collect();

        let kept: Vec<Var> = inputs.to_vec();
        let backward = move |grads: Vec<Option<Tensor>>, outer: &mut Backward| {
            let mut tape = Tape::recording();
            let inner: Vec<Var> = kept
                .iter()
                .map(|v| match v.source {
                    Source::Value { .. } => tape.input(v.value.clone()),
                    _ => v.clone(),
                })
                .collect();
            let outputs = f(&mut tape, &inner)?;
            if outputs.len() != grads.len() {
                return Err(Error::Tape("a recomputed function changed its number of outputs"));
            }
            let mut walk = Backward::new(tape.id, tape.values, outer.grads());
            for (output, grad) in outputs.into_iter().zip(grads) {
                if let Some(grad) = grad {
                    walk.give(output.source, grad)?;
                }
            }
            tape.walk_back(&mut walk)?;
            let results: Vec<_> = inner.iter().map(|v| walk.take(v.source)).collect();
            drop(walk);
            for (var, grad) in kept.iter().zip(results) {
                if let Some(grad) = grad {
                    outer.give(var.source, grad)?;
                }
            }
            Ok(())
        };
        // Whatever the inputs are: parameters made inside `f` want gradients too.
        Ok(self.push(outputs, backward))
    }
}
