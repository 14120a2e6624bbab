//! The stage `model`: the whole student learns the teacher's distributions of the next token. Gradients go back block by
//! block, so that the activations of one are in memory at a time.

use std::collections::HashMap;
use std::ops::Range;

use anyhow::{Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use serde_json::json;

use super::job::HealJob;
use super::likely::{Labels, Likely};
use super::rounding::{self, Inputs, Rounding};
use super::tensors::{Healed, Selected, tensors};
use crate::checkpoint::Checkpoint;
use crate::device::to_host;
use crate::error::Failure;
use crate::model::{Block, Decoder, Head, Hidden, Trained, Walk};
use crate::progress::Progress;
use crate::report::HealedModel;
use crate::store::{Journal, Values};
use crate::train::{Course, Keep, Objective, Pieces, State, Variables, fit, held_out};
use crate::workers::Workers;

/// The journal key of the stage.
const PIECE: &str = "healed-model";

/// The journal key of the last state of the stage.
const STATE: &str = "healing-model";

/// Bytes of a state that is kept, for each trained parameter: its value, the best one, and two moments.
pub(super) const STATE_BYTES: u64 = 16;

/// The state of the training of the whole model between two steps, of which the last is kept.
pub(super) struct KeptState<'a> {
    pub journal: &'a Journal,
    /// Steps from one to the next.
    pub every: usize,
}

impl Keep for KeptState<'_> {
    fn every(&self) -> usize {
        self.every
    }

    fn last(&self) -> Result<Option<(State, Vec<Vec<f32>>)>> {
        let Some(mut piece) = self.journal.get(STATE)? else { return Ok(None) };
        let state = serde_json::from_value(piece.fields.take())?;
        let arrays = piece.rest().into_iter().map(|array| array.read()?.f32s()).collect::<Result<_>>()?;
        Ok(Some((state, arrays)))
    }

    fn keep(&self, state: &State, arrays: Vec<Vec<f32>>) -> Result<()> {
        self.journal.put(STATE, json!(state), arrays.into_iter().map(Values::from).collect()).map(|_| ())
    }
}

/// The student as a whole, and what it learns.
pub(super) struct WholeModel<'a> {
    pub student: &'a Decoder<'a>,
    trained: &'a Selected,
    /// The student's files.
    pub checkpoint: &'a Checkpoint,
    pub walk: &'a Walk<'a>,
    head: Head,
    /// The student's states before the first block.
    pub embedded: Hidden,
    /// By window.
    likely: Vec<Likely>,
    /// The share of the text's own next tokens in the loss of [`Self::run`].
    labels: f64,
}

impl<'a> WholeModel<'a> {
    /// Runs the teacher.
    ///
    /// # Errors
    /// A model cannot be read or run, or a state is not finite.
    pub fn new(
        teacher: &Decoder<'_>,
        (student, trained): (&'a Decoder<'a>, &'a Selected),
        checkpoint: &'a Checkpoint,
        walk: &'a Walk<'a>,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let stage = progress.stage("teacher", (walk.n_tokens() * teacher.n_blocks()) as u64, "tokens");
        let states = walk.embed(teacher)?;
        for block_idx in 0..teacher.n_blocks() {
            stage.note(&teacher.block_name(block_idx));
            walk.advance(&states, teacher, &teacher.block(block_idx)?, stage.as_ref())?;
        }
        let (head, mut likely) = (teacher.head()?, Vec::new());
        walk.for_each_window(
            &[&states],
            |_, states| {
                let mut found = Likely::default();
                head.for_each_logits(&states[0], |_, logits| {
                    found.add(&to_host(logits)?, head.vocab_size());
                    Ok(())
                })?;
                Ok(found)
            },
            |_, found| {
                likely.push(found);
                Ok(())
            },
        )?;
        walk.release(states);
        Ok(Self {
            student,
            trained,
            checkpoint,
            walk,
            head: student.head()?,
            embedded: walk.embed(student)?,
            likely,
            labels: 0.0,
        })
    }

    /// With this share of the text's own next tokens in the loss of [`Self::run`].
    pub fn with_labels(self, labels: f64) -> Self {
        Self { labels, ..self }
    }

    /// Trains the student, which begins with what was `healed` so far.
    ///
    /// # Errors
    /// The models cannot be read or run, or a loss is not finite.
    pub fn run(
        &self,
        healed: &mut Healed,
        pieces: &Pieces,
        job: &HealJob<'_>,
        kept: &KeptState<'_>,
        progress: &dyn Progress,
    ) -> Result<HealedModel> {
        let journal = kept.journal;
        if let Some(mut piece) = journal.get(PIECE)? {
            let (names, record): (Vec<String>, HealedModel) = serde_json::from_value(piece.fields.take())?;
            for name in names {
                healed.insert(name, piece.take()?.read()?.f32s()?);
            }
            return Ok(record);
        }
        let stage = progress.stage("heal the model", (job.epochs * pieces.trained.len()) as u64, "windows");
        let (student, workers) = (self.student, self.walk.workers());
        let variables = self.trained.variables(student, self.checkpoint, 0..student.n_blocks(), healed)?;
        let start = variables.values()?;
        let before = self.divergence(healed, &pieces.held_out)?;
        let settings = job.settings_of_model(before);
        let course = fit(&variables, self, pieces, &settings, workers, Some(kept), stage.as_ref())?;
        variables.set(&self.rounded(&variables, pieces)?)?;
        let after = held_out(&variables, self, pieces, workers)?;
        let is_better = after < course.held_out[0];
        let course = if is_better { course } else { Course { best: 0, ..course } };
        if !is_better {
            variables.set(&start)?;
        }
        let changed = variables.iter().zip(&start).zip(variables.values()?).filter(|((_, start), now)| *start != now);
        let changed: Healed = changed.map(|(((name, _), _), now)| (name.to_string(), now)).collect();
        let arrays = changed.values().cloned().map(Values::from).collect();
        let names: Vec<String> = changed.keys().cloned().collect();
        healed.extend(changed);
        let record = HealedModel {
            divergence_before: before,
            divergence_after: match (is_better, self.labels > 0.0) {
                (false, _) => before,
                (true, true) => self.divergence(healed, &pieces.held_out)?,
                // Without labels the loss is the divergence.
                (true, false) => after,
            },
            learning_rate: settings.learning_rate,
            best_epoch: course.best,
            trained: course.trained,
            held_out: course.held_out,
        };
        journal.put(PIECE, json!([names, record]), arrays)?;
        journal.remove(STATE);
        Ok(record)
    }

    /// The values of the variables as the files store them, with feedback in the inputs of the linears.
    fn rounded(&self, variables: &Variables, pieces: &Pieces) -> Result<Vec<Vec<f32>>> {
        let (walk, mut rounding) = (self.walk, Rounding::new(self.checkpoint, variables)?);
        let mut states = self.entering(rounding::read(pieces, walk))?;
        for (block_idx, block) in self.model(&variables.detached())?.iter().enumerate() {
            let observed = |i: usize| {
                let mut inputs = Inputs::default();
                let after = block.forward(&states[i], walk.rope(), &mut |site, x| inputs.add(site, x))?;
                Ok((after, inputs))
            };
            let (mut after, mut all) = (Vec::new(), Inputs::default());
            walk.workers().in_order(states.len(), observed, |_, (state, inputs)| {
                after.push(state);
                all.join(inputs)
            })?;
            rounding.feed_back(block_idx, all)?;
            states = after;
        }
        Ok(rounding.values(variables))
    }

    /// The mean divergence of the rows of some windows, with what was `healed`; one block is in memory at a time.
    ///
    /// # Errors
    /// The student cannot be read or run, or the divergence is not finite.
    pub fn divergence(&self, healed: &Healed, windows: &[usize]) -> Result<f64> {
        let (walk, variables) = (self.walk, tensors(healed, self.checkpoint, self.student.device())?);
        let trained = Trained { below: self.checkpoint, variables: &variables };
        let student = self.student.with_weights(&trained);
        let mut states = self.entering(windows)?;
        for block_idx in 0..student.n_blocks() {
            states = self.through(&student.block(block_idx)?, &states, walk.workers())?;
        }
        let mut sum = 0.0;
        for (&window_idx, x) in windows.iter().zip(&states) {
            let x = x.squeeze(0)?;
            let divergence = self.at_head(&x, window_idx, 0.0, None)?.0 / x.dim(0)? as f64;
            if !divergence.is_finite() {
                return Err(Failure::numeric(format!("{}: the loss is not finite", self.place(window_idx))).into());
            }
            sum += divergence;
        }
        Ok(sum / windows.len().max(1) as f64)
    }

    /// The states (1, n_tokens, hidden_size) of windows before the first block.
    fn entering(&self, windows: &[usize]) -> Result<Vec<Tensor>> {
        windows.iter().map(|&window_idx| Ok(self.walk.window(&self.embedded, window_idx)?.unsqueeze(0)?)).collect()
    }

    /// The states of windows after a block, from those before it.
    fn through(&self, block: &Block, states: &[Tensor], workers: &Workers) -> Result<Vec<Tensor>> {
        let mut after = Vec::new();
        let forward = |i: usize| Ok(block.forward(&states[i], self.walk.rope(), &mut |_, _| Ok(()))?.detach());
        workers.in_order(states.len(), forward, |_, state| {
            after.push(state);
            Ok(())
        })?;
        Ok(after)
    }

    /// The mean losses of the rows of windows from their last states, and the gradients of the mean of these with
    /// respect to the states.
    fn at_heads(&self, states: &[Tensor], windows: &[usize], workers: &Workers) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
        let (mut losses, mut gradients) = (Vec::new(), Vec::new());
        let at_head = |i: usize| {
            let x = states[i].squeeze(0)?;
            let n_rows = x.dim(0)? as f64;
            let (sum, gradient) =
                self.at_head(&x, windows[i], self.labels, Some(1.0 / (windows.len() as f64 * n_rows)))?;
            let gradient = gradient.expect("invariant: a gradient was asked for").unsqueeze(0)?;
            Ok((Tensor::new((sum / n_rows) as f32, x.device())?, gradient))
        };
        workers.in_order(windows.len(), at_head, |_, (loss, gradient)| {
            losses.push(loss);
            gradients.push(gradient);
            Ok(())
        })?;
        Ok((losses, gradients))
    }

    /// The summed loss of the rows of last states `x` (n_rows, hidden_size), with this share of `labels` and the rest
    /// divergence, and the gradient of `scale` times it if it is asked for.
    pub fn at_head(
        &self,
        x: &Tensor,
        window_idx: usize,
        labels: f64,
        scale: Option<f64>,
    ) -> Result<(f64, Option<Tensor>)> {
        let (head, mut sum) = (&self.head, 0.0);
        let labels = Labels { tokens: self.walk.ids(window_idx), share: labels };
        let mut losses = |rows: Range<usize>, logits: &Tensor| {
            let mut values = to_host(logits)?;
            sum += self.likely[window_idx].loss(rows, &mut values, head.vocab_size(), labels);
            Ok(values)
        };
        let Some(scale) = scale else {
            head.for_each_logits(x, |rows, logits| losses(rows, logits).map(|_| ()))?;
            return Ok((sum, None));
        };
        let gradient = head.gradient(x, |rows, logits| {
            let slope = Tensor::from_vec(losses(rows, logits)?, logits.shape(), logits.device())?;
            head.before_cap(slope.affine(scale, 0.0)?, logits)
        })?;
        Ok((sum, Some(gradient)))
    }
}

impl Objective for WholeModel<'_> {
    type Model = Vec<Block>;

    fn model(&self, tensors: &HashMap<String, Tensor>) -> Result<Vec<Block>> {
        let trained = Trained { below: self.checkpoint, variables: tensors };
        let student = self.student.with_weights(&trained);
        (0..student.n_blocks()).map(|block_idx| student.block(block_idx)).collect()
    }

    /// The mean loss of a row.
    fn loss(&self, blocks: &Vec<Block>, window_idx: usize) -> Result<Tensor> {
        let mut x = self.walk.window(&self.embedded, window_idx)?.unsqueeze(0)?;
        for block in blocks {
            x = block.forward(&x, self.walk.rope(), &mut |_, _| Ok(()))?.detach();
        }
        let x = x.squeeze(0)?;
        let (sum, _) = self.at_head(&x, window_idx, self.labels, None)?;
        Ok(Tensor::new((sum / x.dim(0)? as f64) as f32, x.device())?)
    }

    /// Block after block, back through all windows: the gradients of one block and one window are beside the sums.
    fn gradients(
        &self,
        blocks: &Vec<Block>,
        variables: &Variables,
        windows: &[usize],
        workers: &Workers,
    ) -> Result<(Vec<Tensor>, GradStore)> {
        let mut states = self.entering(windows)?;
        let mut entered = Vec::new();
        for block in blocks {
            let next = self.through(block, &states, workers)?;
            entered.push(std::mem::replace(&mut states, next));
        }
        let (losses, mut gradients) = self.at_heads(&states, windows, workers)?;
        let mut total = GradStore::default();
        for (block, entered) in blocks.iter().zip(entered).rev() {
            let mut before = Vec::new();
            let back = |i: usize| {
                let x = Var::from_tensor(&entered[i])?;
                let y = block.forward(&x, self.walk.rope(), &mut |_, _| Ok(()))?;
                let mut store = (y * &gradients[i])?.sum_all()?.backward()?;
                let gradient = store.remove(&x).context("no gradient reached the input of a block")?;
                Ok((gradient.detach(), store))
            };
            workers.in_order(windows.len(), back, |_, (gradient, store)| {
                before.push(gradient);
                variables.add_gradients(&mut total, &store)
            })?;
            gradients = before;
        }
        Ok((losses, total))
    }

    fn place(&self, window_idx: usize) -> String {
        format!("{} in healing the model", self.walk.place()(window_idx))
    }
}
