use candle_core::{Device, Tensor, Var};
use faer::Mat;
use proptest::prelude::*;

use super::products::portable_mixed_slices;
use super::*;
use crate::approx::low_rank::{self, Decomposition, LowRank};
use crate::approx::metric::{Metric, MetricPair};
use crate::codecs::cast::{self, Dtype};
use crate::linalg;
use crate::quantize::{Levels, Scheme};

fn pivot() -> Kind {
    Kind::default()
}

/// A fit of every layout to a random matrix of a shape.
fn fits(weight: &Mat<f64>, metric: MetricPair<'_>) -> Vec<(Kind, Fit)> {
    let fit = |kind: Kind| {
        let rank = kind.fitting().largest_rank(weight.shape());
        (kind, kind.fitting().fit(weight.as_ref(), metric, rank).unwrap())
    };
    Kind::layouts().map(fit).collect()
}

fn squared_error(weight: &Mat<f64>, term: &Term, metric: MetricPair<'_>) -> f64 {
    let (m, n) = weight.shape();
    let product = linalg::transposed_from_row_major(&term.product((m, n)), m, n);
    metric.squared_norm((weight - product.transpose()).as_ref())
}

#[test]
fn names_are_found_again_and_first_parts_tell_layouts_apart() {
    for kind in Kind::layouts() {
        assert_eq!(kind.name().parse(), Ok(kind));
        let first = format!("{}.weight", kind.structure().suffixes()[0].0);
        assert_eq!(Kind::stored(|part| part == first), Some(kind));
    }
    assert!("dense".parse::<Kind>().is_err() && Kind::stored(|part| part == "weight").is_none());
    assert!(
        is_second_part("x.lr_b") && is_second_part("x.base") && !is_second_part("x.lr_a") && !is_second_part("base")
    );
}

proptest! {
    #[test]
    fn every_layout_stores_what_it_says(m in 2usize..24, n in 2usize..24, share in 0.1f64..1.0, seed in 0u64..1000) {
        let weight = noise(m, n, seed);
        for (kind, fit) in fits(&weight, MetricPair::IDENTITY) {
            let most = kind.fitting().largest_rank((m, n));
            let rank = ((share * most as f64) as usize).max(1);
            let term = Term::laid_out(kind, fit.pair(kind, weight.as_ref(), rank), (m, n));
            // The number of parameters equals the number of stored values, and the shapes determine the size.
            let parts = term.form.parts((m, n));
            let stored: usize = parts.iter().zip(&term.parts).filter(|(part, _)| part.element == Element::Float)
                .map(|(_, matrix)| matrix.values().len()).sum();
            prop_assert_eq!(stored as u64, kind.n_parameters(rank, (m, n)));
            let shapes: Vec<[usize; 2]> = parts.iter().map(|part| part.shape).collect();
            prop_assert_eq!(kind.structure().measure(&shapes), Some((term.form.size, (m, n))));
            let n_kept = match &fit.values {
                FitValues::Dual(dual) => { let (_, basis, dual) = dual.to_arrays(); basis.len() + dual.len() }
                FitValues::Pair(pair) => pair.b.len() + pair.a.len(),
            };
            prop_assert!(n_kept as u64 <= kind.fitting().n_values(most, (m, n)));
            // In the plain metric the curve is the error.
            let (found, expected) = (squared_error(&weight, &term, MetricPair::IDENTITY), fit.curve.squared_error(rank));
            prop_assert!((found - expected).abs() < 1e-4 * (1.0 + expected), "{:?} {} {}", kind, found, expected);
            // Full rank reproduces the weight.
            let whole = Term::laid_out(kind, fit.pair(kind, weight.as_ref(), most), (m, n));
            prop_assert!(squared_error(&weight, &whole, MetricPair::IDENTITY) < 1e-6 * (m * n) as f64);
            let saving = kind.fitting().largest_saving_rank((m, n));
            prop_assert!(saving == 0 || kind.n_parameters(saving, (m, n)) < (m * n) as u64);
            prop_assert!(saving >= most || kind.n_parameters(saving + 1, (m, n)) >= (m * n) as u64);
            // The stored parts give back the fit, in the order of its ranks.
            let pair = kind.fitting().pair(&term.parts, term.form.size, (m, n));
            let kept = fit.pair(kind, weight.as_ref(), rank);
            let pair = match kind.fitting().rank_factor(&term.parts, &kept.b) {
                Some(factor) => kind.fitting().restored(pair, &factor, (m, n)),
                None => Some(pair),
            };
            if let Some(pair) = pair {
                let again = Term::laid_out(kind, pair, (m, n)).product((m, n));
                prop_assert!(again.iter().zip(term.product((m, n))).all(|(x, y)| (x - y).abs() < 1e-2));
            }
        }
    }

    #[test]
    fn every_layout_applies_the_matrix_and_its_gradients(m in 2usize..12, n in 2usize..12, seed in 0u64..1000) {
        let weight = noise(m, n, seed);
        for (kind, fit) in fits(&weight, MetricPair::IDENTITY) {
            let rank = kind.fitting().largest_rank((m, n)).div_ceil(2);
            let term = Term::laid_out(kind, fit.pair(kind, weight.as_ref(), rank), (m, n));
            let parts = variables(&term, (m, n));
            let tensors: Vec<Tensor> = parts.iter().map(|(tensor, _)| tensor.clone()).collect();
            let x = Var::from_vec((0..3 * n).map(|i| ((i * 7 + 3) % 11) as f32 - 5.0).collect::<Vec<_>>(), (3, n), &Device::Cpu).unwrap();
            let y = kind.structure().apply(&tensors, &x).unwrap();
            let product = Tensor::from_vec(term.product((m, n)), (m, n), &Device::Cpu).unwrap();
            let expected = x.as_tensor().matmul(&product.t().unwrap()).unwrap();
            let largest = |t: Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            let by_steps = stepped(kind, term.form.size, &tensors, &x);
            prop_assert!(largest((&by_steps - &y).unwrap()) < 1e-4 * (1.0 + largest(y.clone())), "{:?}", kind);
            prop_assert!(largest((&y - &expected).unwrap()) < 1e-3 * (1.0 + largest(expected)), "{:?}", kind);
            // The output is linear in every part: its change along a part is the output, or a share of it.
            let gradients = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            let energy = y.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
            let along_x = (gradients.get(&x).unwrap() * x.as_tensor()).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
            prop_assert!((along_x - 2.0 * energy).abs() < 1e-3 * (1.0 + energy), "{:?}", kind);
            for (_, variable) in parts.iter().filter_map(|(tensor, variable)| Some((tensor, variable.as_ref()?))) {
                // An empty part has no gradient.
                let Some(gradient) = gradients.get(variable) else { continue };
                let along = (gradient * variable.as_tensor()).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
                prop_assert!(along.is_finite());
                let step = 1e-2f32;
                let moved: Vec<Tensor> = parts.iter().map(|(tensor, other)| match other {
                    Some(other) if std::ptr::eq(other, variable) => (other.as_tensor() * f64::from(1.0 + step)).unwrap(),
                    _ => tensor.clone(),
                }).collect();
                let after = kind.structure().apply(&moved, &x).unwrap().sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
                prop_assert!(((after - energy) / step - along).abs() < 0.03 * (energy.abs() + along.abs()) + 1e-2, "{:?} {} {}", kind, (after - energy) / step, along);
            }
        }
    }
}

/// `x` (rows, in) taken through the steps of a structure.
fn stepped(kind: Kind, size: Size, parts: &[Tensor], x: &Tensor) -> Tensor {
    let times = |x: &Tensor, weight: &Tensor| match *x.dims() {
        [slices, _, _] => {
            let weight = weight.reshape((slices, weight.dim(0).unwrap() / slices, ())).unwrap();
            x.matmul(&weight.transpose(1, 2).unwrap().contiguous().unwrap()).unwrap()
        }
        _ => x.matmul(&weight.t().unwrap()).unwrap(),
    };
    let step = |x: Tensor, step: &Step| match *step {
        Step::Multiply(part) => times(&x, &parts[part]),
        Step::Append(part) if parts[part].dim(0).unwrap() == 0 => x,
        Step::Append(part) => Tensor::cat(&[&x, &times(&x, &parts[part])], 1).unwrap(),
        Step::Order(part) => x.index_select(&parts[part], 1).unwrap(),
        Step::Slice(count) => {
            let (rows, width) = x.dims2().unwrap();
            x.reshape((rows, count, width / count)).unwrap().transpose(0, 1).unwrap().contiguous().unwrap()
        }
        Step::Exchange => {
            let (count, rows, width) = x.dims3().unwrap();
            let x = x.reshape((count, rows, count, width / count)).unwrap().permute((2, 1, 0, 3)).unwrap();
            x.contiguous().unwrap().reshape((count, rows, width)).unwrap()
        }
        Step::Mix(part) => portable_mixed_slices(&x, &parts[part]).unwrap(),
        Step::Join => {
            let (count, rows, width) = x.dims3().unwrap();
            x.transpose(0, 1).unwrap().contiguous().unwrap().reshape((rows, count * width)).unwrap()
        }
    };
    kind.structure().steps(size).iter().fold(x.clone(), step)
}

/// The parts of a term as tensors; float parts are variables.
fn variables(term: &Term, shape: Shape) -> Vec<(Tensor, Option<Var>)> {
    let one = |(part, matrix): (Part, &Matrix)| match matrix {
        Matrix::Indices(places) => {
            let places: Vec<u32> = places.iter().map(|&place| place as u32).collect();
            (Tensor::new(places, &Device::Cpu).unwrap(), None)
        }
        matrix => {
            let [rows, cols] = part.shape;
            let variable = Var::from_vec(matrix.values().into_owned(), (rows, cols), &Device::Cpu).unwrap();
            (variable.as_tensor().clone(), Some(variable))
        }
    };
    term.form.parts(shape).into_iter().zip(&term.parts).map(one).collect()
}

#[test]
fn blocks_are_fitted_by_themselves_and_their_common_error_is_known() {
    let (m, n) = (24, 40);
    for (output, input) in [("identity", "full"), ("full", "identity"), ("full", "full"), ("diagonal", "diagonal")] {
        let (weight, output, input) = (weight(m, n, 3), form(output, m, 4), form(input, n, 5));
        let metric = MetricPair { output: &output, input: &input };
        let kind: Kind = "monarch".parse().unwrap();
        let most = kind.fitting().largest_rank((m, n));
        let fit = kind.fitting().fit(weight.as_ref(), metric, most).unwrap();
        for rank in 1..most {
            let pair = fit.pair(kind, weight.as_ref(), rank);
            let found = squared_error(&weight, &Term::laid_out(kind, pair, (m, n)), metric);
            let ratio = found / fit.curve.squared_error(rank);
            assert!((0.7..1.4).contains(&ratio), "{rank}: {ratio}");
        }
    }
    // The fit is exact if the matrix consists of such blocks: each of the sixteen is an outer product.
    let blocks = Mat::from_fn(8, 12, |i, j| {
        ((i % 2 + 1) * (j % 3 + 2)) as f64 + 10.0 * ((i / 2 * 4 + j / 3) as f64) * ((i % 2 + 1) * (j % 3 + 2)) as f64
    });
    let kind: Kind = "monarch".parse().unwrap();
    let fit = kind.fitting().fit(blocks.as_ref(), MetricPair::IDENTITY, 1).unwrap();
    assert!(
        squared_error(
            &blocks,
            &Term::laid_out(kind, fit.pair(kind, blocks.as_ref(), 1), (8, 12)),
            MetricPair::IDENTITY
        ) < 1e-6
    );
}

#[test]
fn refitting_is_better_than_rounding_both() {
    let (m, n) = (40, 60);
    let weight = Mat::from_fn(m, n, |i, j| ((i * 31 + j * 17 + i * j) % 23) as f64 - 11.0);
    let gradients = Mat::from_fn(200, m, |i, j| ((i * 7 + j * j + i * j * 3) % 13) as f64 - 6.0);
    let output = Metric::damped(gradients.transpose() * &gradients, 0.01);
    for metric in [&output, &Metric::Identity] {
        let pair = MetricPair { output: metric, input: &Metric::Identity };
        // Blocks are refitted separately, each in its own part of a Gram.
        let is_seen_whole = |kind: &Kind| kind.name() != "monarch" || matches!(metric, Metric::Identity);
        for kind in Kind::layouts().filter(is_seen_whole) {
            let rank = kind.fitting().largest_rank((m, n)) / 4;
            let fit = kind.fitting().fit(weight.as_ref(), pair, rank).unwrap();
            let term = Term::laid_out(kind, fit.pair(kind, weight.as_ref(), rank), (m, n));
            let floor = squared_error(&weight, &term, pair);
            for bits in [4, 8] {
                let scheme = Scheme { levels: Levels::Int { bits, symmetric: true }, group: Some(128) };
                let refitted = squared_error(&weight, &term.quantized(weight.as_ref(), metric, scheme).unwrap(), pair);
                let round = |(part, matrix): (Part, &Matrix)| match part.element {
                    Element::Float => Matrix::quantized(&matrix.values(), part.shape[0], part.shape[1], scheme),
                    Element::Index => matrix.clone(),
                };
                let parts = term.form.parts((m, n)).into_iter().zip(&term.parts).map(round).collect();
                let rounded = squared_error(&weight, &Term { form: term.form, parts }, pair);
                assert!(floor < refitted && refitted < rounded, "{bits} {kind}: {floor} {refitted} {rounded}");
            }
        }
    }
}

const DTYPE: Dtype = Dtype::BF16;

fn noise(rows: usize, cols: usize, seed: u64) -> Mat<f64> {
    let mut state = seed;
    Mat::from_fn(rows, cols, |_, _| {
        // SplitMix64; the sum of four is close enough to a normal value.
        let mut next = || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((mixed ^ (mixed >> 31)) >> 11) as f64 / (1u64 << 53) as f64 - 0.5
        };
        next() + next() + next() + next()
    })
}

/// Samples of `n` features with a falling spectrum, one value far above the others.
fn samples(n: usize, seed: u64) -> Mat<f64> {
    let mixed = noise(3 * n, n, seed) * linalg::orthonormal_columns(noise(n, n, seed + 1)).transpose();
    let decay = |j: usize| if j == 0 { 8.0 } else { (1.0 + j as f64).powf(-0.5) };
    let faded = Mat::from_fn(3 * n, n, |i, j| mixed[(i, j)] * decay(j));
    faded * linalg::orthonormal_columns(noise(n, n, seed + 2)).transpose()
}

fn form(kind: &str, n: usize, seed: u64) -> Metric {
    let samples = samples(n, seed);
    let gram = samples.transpose() * &samples;
    match kind {
        "identity" => Metric::Identity,
        "diagonal" => Metric::diagonal((0..n).map(|i| gram[(i, i)]).collect()),
        _ => Metric::damped(gram, 0.01),
    }
}

fn weight(m: usize, n: usize, seed: u64) -> Mat<f64> {
    let k = m.min(n);
    let left = linalg::orthonormal_columns(noise(m, k, seed + 11));
    let faded = Mat::from_fn(m, k, |i, j| left[(i, j)] * (1.0 + j as f64).powf(-0.5));
    faded * linalg::orthonormal_columns(noise(n, k, seed + 12)).transpose()
}

struct Case {
    weight: Mat<f64>,
    output: Metric,
    input: Metric,
    decomposition: Decomposition,
    pair: LowRank,
}

impl Case {
    fn new((m, n): (usize, usize), rank: usize, output: &str, input: &str, seed: u64) -> Self {
        let (weight, output, input) = (weight(m, n, seed), form(output, m, seed + 1), form(input, n, seed + 2));
        let metric = MetricPair { output: &output, input: &input };
        let decomposition = low_rank::decompose(weight.as_ref(), metric, rank).unwrap();
        let pair = decomposition.truncate(weight.as_ref(), rank);
        Self { weight, output, input, decomposition, pair }
    }

    /// The sides as a study has them: for the larger input side, only the diagonal of a Gram.
    fn sides(&self) -> Sides<'_> {
        let (m, n) = (self.weight.nrows(), self.weight.ncols());
        let input = match &self.input {
            Metric::Full(_) if m <= n => Side::Diagonal(Metric::diagonal(self.input.to_diagonal(n))),
            input => Side::Whole(input),
        };
        Sides { output: &self.output, input, energies: self.decomposition.curve.energies() }
    }

    /// Error of parts relative to the exact factors, over the norm of the weight, both in the metric.
    fn error(&self, term: &Term) -> f64 {
        let (m, n) = self.weight.shape();
        let pair = linalg::product_row_major(&self.pair.b, &self.pair.a, m, self.pair.rank, n);
        let [found, exact] =
            [term.product((m, n)), pair].map(|values| linalg::transposed_from_row_major(&values, m, n));
        let metric = MetricPair { output: &self.output, input: &self.input };
        (metric.squared_norm((found - exact).transpose()) / self.decomposition.curve.squared_error(0)).sqrt()
    }

    fn rounded(&self, kind: Kind) -> (Term, f64) {
        let shape = self.weight.shape();
        let Rounded { parts, squared_error } = kind.fitting().round(&self.pair, shape, &self.sides(), DTYPE);
        let term = Term { form: Form::of_rank(kind, self.pair.rank, shape), parts };
        assert_eq!(term.rounded(DTYPE).unwrap(), term, "every value is one of the dtype");
        (term, squared_error)
    }

    /// Error of the layout, rounded to nearest.
    fn plain(&self, kind: Kind) -> f64 {
        self.error(&Term::laid_out(kind, self.pair.clone(), self.weight.shape()).rounded(DTYPE).unwrap())
    }
}

#[test]
fn feedback_beats_rounding_in_all_nine_metrics_and_knows_its_error() {
    let (mut gains, mut ratios) = ([Vec::new(), Vec::new()], Vec::new());
    for shape in [(48, 96), (96, 48), (64, 64)] {
        let rank = pivot().fitting().largest_saving_rank(shape) * 7 / 10;
        for output in ["identity", "diagonal", "full"] {
            for input in ["identity", "diagonal", "full"] {
                // If one input outweighs all others, a single case is decided by chance.
                let cases: Vec<Case> = (0..6).map(|seed| Case::new(shape, rank, output, input, 100 * seed)).collect();
                for layout in [pivot(), Kind::FACTORS] {
                    let (mut found, mut plain, mut expected) = (0.0, 0.0, 0.0);
                    for case in &cases {
                        let (term, squared_error) = case.rounded(layout);
                        found += case.error(&term).powi(2);
                        plain += case.plain(layout).powi(2);
                        expected += squared_error / case.decomposition.curve.squared_error(0);
                    }
                    let (gain, ratio) = ((plain / found).sqrt(), (expected / found).sqrt());
                    let name = format!("{shape:?} {output} {input} {layout:?}");
                    assert!((0.4..2.5).contains(&ratio), "{name}: {ratio}");
                    ratios.push(ratio);
                    // With an outlier on both sides a single value makes up nearly all of the error of factors.
                    if layout == pivot() || (output, input) != ("full", "full") {
                        gains[usize::from(layout == Kind::FACTORS)].push(gain);
                    }
                }
            }
        }
    }
    let means = gains.each_ref().map(|gains| gains.iter().sum::<f64>() / gains.len() as f64);
    let least = gains.map(|gains| gains.into_iter().fold(f64::INFINITY, f64::min));
    assert!(means[0] > 3.0 && means[1] > 1.1, "{means:?}");
    assert!(least[0] > 1.0 && least[1] > 1.0, "{least:?}");
    let ratio = ratios.iter().sum::<f64>() / ratios.len() as f64;
    assert!((0.9..1.1).contains(&ratio), "{ratio}");
}

#[test]
fn long_coefficients_cost_no_more_than_twice_what_a_dense_weight_does() {
    for shape in [(160, 560), (560, 160)] {
        let case = Case::new(shape, 120, "full", "full", 0);
        let metric = MetricPair { output: &case.output, input: &case.input };
        let dense = Mat::from_fn(shape.0, shape.1, |i, j| {
            case.weight[(i, j)] - f64::from(cast::nearest(DTYPE, case.weight[(i, j)] as f32))
        });
        let dense = (metric.squared_norm(dense.as_ref()) / case.decomposition.curve.squared_error(0)).sqrt();
        let (found, plain) = (case.error(&case.rounded(pivot()).0), case.plain(pivot()));
        assert!(found < 2.0 * dense && found < 0.4 * plain, "{shape:?}: {found}, plain {plain}, dense {dense}");
    }
}

#[test]
fn a_pair_of_rank_one_is_rounded_as_by_hand() {
    // Rows 3 and 1 + 2⁻⁹ of the column, plain metric: the pivot is 3, the coefficient c = (1 + 2⁻⁹) / 3 rounded to ĉ,
    // and the row is the nearest value to a (1 + c ĉ) / (1 + ĉ²).
    let (long, short) = (3.0f32, 1.0 + 1.0 / 512.0);
    let a = [0.71f32, -1.3, 2.9];
    let pair = LowRank { rank: 1, b: vec![short, long], a: a.to_vec() };
    let energies = [f64::from(long * long + short * short)];
    let sides = Sides { output: &Metric::Identity, input: Side::Whole(&Metric::Identity), energies: &energies };
    let Rounded { parts, .. } = pivot().fitting().round(&pair, (2, 3), &sides, DTYPE);
    let [pivots, coefficients, permutation] = &parts[..] else { panic!("pivots have three parts") };
    let c = f64::from(short) / f64::from(long);
    let c_hat = f64::from(cast::nearest(DTYPE, c as f32));
    assert_eq!((permutation.indices(), coefficients.values().to_vec()), (&[1, 0][..], vec![c_hat as f32]));
    let fitted = a.map(|a| f64::from(a) * f64::from(long) * (1.0 + c * c_hat) / (1.0 + c_hat * c_hat));
    assert_eq!(pivots.values().to_vec(), fitted.map(|v| cast::nearest(DTYPE, v as f32)));
}

/// Training moves every value by less than half a unit in its last place: to nearest, nothing is left of it.
#[test]
fn rounding_keeps_what_training_moved_and_the_rows_of_pivots() {
    let (shape, rank) = ((64, 48), 24);
    let nudged = |values: &[f32]| -> Vec<f32> { values.iter().map(|value| value * (1.0 + 1.0 / 1024.0)).collect() };
    for seed in 0..4 {
        let case = Case::new(shape, rank, "identity", "full", 100 * seed);
        let metric = MetricPair { output: &case.output, input: &case.input };
        let matrix = |values: &[f32]| linalg::transposed_from_row_major(values, shape.0, shape.1);
        let error = |a: &[f32], b: &[f32]| metric.squared_norm((matrix(a) - matrix(b)).transpose());
        for kind in [pivot(), Kind::FACTORS] {
            let (before, _) = case.rounded(kind);
            let parts = before.parts.iter().map(|part| match part {
                Matrix::Float(values) => Matrix::Float(nudged(values)),
                other => other.clone(),
            });
            let moved = Term { form: before.form, parts: parts.collect() };
            assert_eq!(moved.rounded(DTYPE).unwrap(), before, "to nearest, all of it is lost");
            let rounded = kind.fitting().round_parts(&moved.parts, moved.form.size, shape, &case.sides(), DTYPE);
            let found = Term { form: before.form, parts: rounded.parts };
            assert_eq!(found.rounded(DTYPE).unwrap(), found, "every value is one of the dtype");
            assert!(kind != pivot() || found.parts[2] == before.parts[2]);
            let of = |term: &Term| error(&term.product(shape), &moved.product(shape));
            let gain = (of(&before) / of(&found)).sqrt();
            assert!(gain > 1.5, "{kind}: {gain}");
            let ratio = (rounded.squared_error / of(&found)).sqrt();
            assert!((0.5..2.0).contains(&ratio), "{kind}: {ratio}");
        }
        let before =
            linalg::to_row_major(case.weight.as_ref()).iter().map(|&v| cast::nearest(DTYPE, v)).collect::<Vec<f32>>();
        let moved = nudged(&before);
        let found = dense_with_feedback(&moved, shape, &case.input, DTYPE).unwrap();
        let gain = (error(&before, &moved) / error(&found, &moved)).sqrt();
        assert!(gain > 1.5, "dense: {gain}");
    }
}

#[test]
fn what_cannot_be_fed_back_is_rounded() {
    // Zeros have no metric, dependent columns have a singular one, and full rank leaves no coefficients.
    for (b, a) in [(vec![0.0; 12], vec![0.0; 10]), (vec![0.3; 12], vec![0.7; 10])] {
        let pair = LowRank { rank: 2, b, a };
        for layout in [pivot(), Kind::FACTORS] {
            let sides = Sides { output: &Metric::Identity, input: Side::Whole(&Metric::Identity), energies: &[0.0; 2] };
            let Rounded { parts, .. } = layout.fitting().round(&pair, (6, 5), &sides, DTYPE);
            let rounded = Term { form: Form::of_rank(layout, 2, (6, 5)), parts };
            let exact = linalg::product_row_major(&pair.b, &pair.a, 6, 2, 5);
            for (found, exact) in rounded.product((6, 5)).iter().zip(exact) {
                assert!((found - exact).abs() <= 0.01 * exact.abs(), "{found} {exact}");
            }
        }
    }
    let case = Case::new((6, 9), 6, "full", "full", 0);
    assert!(case.error(&case.rounded(pivot()).0) < 4e-3);
}
