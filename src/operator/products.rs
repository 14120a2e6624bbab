//! Products of activations with the parts of structures, with gradients that lie in memory as the parts do: candle's own
//! product with a transposed matrix passes its gradient through a strided sum, and computes those of constants too.

use anyhow::Result;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp2, Layout, Shape, Tensor, bail};

use crate::device::{host_slice, is_host, like, to_host, to_host_indices};

/// `x Wᵀ` (rows, out) of `x` (rows, in) and `weight` (out, in).
///
/// # Errors
/// The shapes do not match.
pub(super) fn product(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    Ok(x.apply_op2(weight, Product)?)
}

/// The same of storages on one device.
///
/// # Errors
/// The shapes do not match.
pub(crate) fn product_of<S: BackendStorage>(
    (x, x_layout): (&S, &Layout),
    (weight, weight_layout): (&S, &Layout),
) -> candle_core::Result<(S, Shape)> {
    let ((rows, n), (m, width)) = (x_layout.shape().dims2()?, weight_layout.shape().dims2()?);
    if n != width {
        bail!("inputs of width {n} meet a weight of {width} inputs");
    }
    let y = x.matmul(weight, (1, rows, m, n), x_layout, &weight_layout.transpose(0, 1)?)?;
    Ok((y, Shape::from((rows, m))))
}

struct Product;

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "product"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        product_of((x, x_layout), (weight, weight_layout))
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        product_of((x, x_layout), (weight, weight_layout))
    }

    /// `∂x = ∂y W` and `∂W = ∂yᵀ x`, of those that are asked for.
    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let gradient = gradient.contiguous()?;
        let of_x = x.track_op().then(|| gradient.matmul(&weight.detach())).transpose()?;
        let of_weight = weight.track_op().then(|| gradient.t()?.matmul(&x.detach())).transpose()?;
        Ok((of_x, of_weight))
    }
}

/// The columns of `left` (rows, r) and then of `right` (rows, n), of which column j of the result (rows, m) is the one
/// with the number in `places` (m).
///
/// # Errors
/// The rows differ, or there is no such column.
pub(super) fn columns_of_both(left: &Tensor, right: &Tensor, places: &Tensor) -> Result<Tensor> {
    if !is_host(left.device()) {
        return portable_columns(left, right, places);
    }
    Ok(left.contiguous()?.apply_op2(&right.contiguous()?, Columns { places: to_host_indices(places)? })?)
}

/// The same in candle's operations.
pub(super) fn portable_columns(left: &Tensor, right: &Tensor, places: &Tensor) -> Result<Tensor> {
    Ok(Tensor::cat(&[left, right], 1)?.index_select(places, 1)?)
}

struct Columns {
    places: Vec<u32>,
}

impl CustomOp2 for Columns {
    fn name(&self) -> &'static str {
        "columns-of-both"
    }

    fn cpu_fwd(
        &self,
        left: &CpuStorage,
        left_layout: &Layout,
        right: &CpuStorage,
        right_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let ((rows, r), (also_rows, n)) = (left_layout.shape().dims2()?, right_layout.shape().dims2()?);
        if rows != also_rows || self.places.iter().any(|&place| place as usize >= r + n) {
            bail!("columns of ({rows}, {r}) and ({also_rows}, {n}) do not fit together");
        }
        let (left, right) = (host_slice(left, left_layout)?, host_slice(right, right_layout)?);
        let (mut y, mut both) = (Vec::with_capacity(rows * self.places.len()), vec![0f32; r + n]);
        for row in 0..rows {
            both[..r].copy_from_slice(&left[row * r..][..r]);
            both[r..].copy_from_slice(&right[row * n..][..n]);
            y.extend(self.places.iter().map(|&place| both[place as usize]));
        }
        Ok((CpuStorage::F32(y), Shape::from((rows, self.places.len()))))
    }

    fn bwd(
        &self,
        left: &Tensor,
        right: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let ((rows, r), n, g) = (left.dims2()?, right.dim(1)?, to_host(gradient)?);
        let (mut of_left, mut of_right) = (Vec::with_capacity(rows * r), Vec::with_capacity(rows * n));
        let mut both = vec![0f32; r + n];
        for row in g.chunks_exact(self.places.len()) {
            both.fill(0.0);
            for (&place, g) in self.places.iter().zip(row) {
                both[place as usize] += g;
            }
            of_left.extend_from_slice(&both[..r]);
            of_right.extend_from_slice(&both[r..]);
        }
        Ok((like(left, of_left)?, like(right, of_right)?))
    }
}

/// Slice i of the result (b, rows, r) is the sum of all slices j of `x` (b, rows, r), each times row (i, j) of `scales`
/// (b², r).
///
/// # Errors
/// The shapes do not match.
pub(super) fn mixed_slices(x: &Tensor, scales: &Tensor) -> Result<Tensor> {
    if !is_host(x.device()) {
        return portable_mixed_slices(x, scales);
    }
    Ok(x.contiguous()?.apply_op2(&scales.contiguous()?, Mix)?)
}

/// The same in candle's operations.
pub(super) fn portable_mixed_slices(x: &Tensor, scales: &Tensor) -> Result<Tensor> {
    let (count, _, rank) = x.dims3()?;
    let scales = scales.reshape((count, count, 1, rank))?;
    Ok(x.unsqueeze(0)?.broadcast_mul(&scales)?.sum(1)?)
}

struct Mix;

impl CustomOp2 for Mix {
    fn name(&self) -> &'static str {
        "mixed-slices"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        scales: &CpuStorage,
        scales_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let ((count, rows, rank), pairs) = (x_layout.shape().dims3()?, scales_layout.shape().dims2()?);
        if pairs != (count * count, rank) {
            bail!("{count} slices of width {rank} do not take scales of shape {pairs:?}");
        }
        let (x, scales) = (host_slice(x, x_layout)?, host_slice(scales, scales_layout)?);
        let mut y = vec![0f32; x.len()];
        for ((i, j), scales) in (0..count * count).map(|at| (at / count, at % count)).zip(scales.chunks_exact(rank)) {
            let (to, from) = (&mut y[i * rows * rank..][..rows * rank], &x[j * rows * rank..][..rows * rank]);
            for (to, from) in to.chunks_exact_mut(rank).zip(from.chunks_exact(rank)) {
                to.iter_mut().zip(from).zip(scales).for_each(|((to, from), scale)| *to += from * scale);
            }
        }
        Ok((CpuStorage::F32(y), Shape::from((count, rows, rank))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        scales: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let (count, rows, rank) = x.dims3()?;
        let (values, s, g) = (to_host(x)?, to_host(scales)?, to_host(gradient)?);
        let (mut of_x, mut of_scales) = (vec![0f32; values.len()], vec![0f32; s.len()]);
        for (at, (s, of_s)) in s.chunks_exact(rank).zip(of_scales.chunks_exact_mut(rank)).enumerate() {
            let (of_output, of_input) = ((at / count) * rows * rank, (at % count) * rows * rank);
            let g = g[of_output..][..rows * rank].chunks_exact(rank);
            let x = values[of_input..][..rows * rank].chunks_exact(rank);
            for ((g, x), of_x) in g.zip(x).zip(of_x[of_input..][..rows * rank].chunks_exact_mut(rank)) {
                for k in 0..rank {
                    of_x[k] += g[k] * s[k];
                    of_s[k] += g[k] * x[k];
                }
            }
        }
        Ok((like(x, of_x)?, like(scales, of_scales)?))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};
    use proptest::prelude::*;

    use super::*;
    use crate::device::elsewhere;

    fn variable(rows: usize, columns: usize, seed: usize) -> Var {
        let value = |i: usize| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.5 - 1.0;
        Var::from_vec((0..rows * columns).map(value).collect::<Vec<_>>(), (rows, columns), &Device::Cpu).unwrap()
    }

    /// The gradients of `Σ y³`, which differ from element to element.
    fn gradients(y: &Tensor, of: [&Var; 2]) -> [Vec<f32>; 2] {
        let store = (y.sqr().unwrap() * y).unwrap().sum_all().unwrap().backward().unwrap();
        of.map(|variable| to_host(store.get(variable).unwrap()).unwrap())
    }

    fn expect_close(found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len());
        let close = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-4 * (1.0 + b.abs());
        assert!(found.iter().zip(expected).all(close), "{found:?} {expected:?}");
    }

    proptest! {
        #[test]
        fn products_are_candles_in_values_and_gradients(rows in 1usize..7, m in 1usize..9, n in 1usize..9) {
            let (x, weight) = (variable(rows, n, 1), variable(m, n, 2));
            let (found, expected) = (product(&x, &weight).unwrap(), x.matmul(&weight.t().unwrap()).unwrap());
            expect_close(&to_host(&found).unwrap(), &to_host(&expected).unwrap());
            for (found, expected) in gradients(&found, [&x, &weight]).iter().zip(gradients(&expected, [&x, &weight])) {
                expect_close(found, &expected);
            }
        }

        #[test]
        fn columns_are_those_of_the_portable_form_in_values_and_gradients(
            (rows, r, n) in (1usize..6, 1usize..6, 1usize..6), seed in 0usize..99,
        ) {
            let (left, right) = (variable(rows, r, 1), variable(rows, n, 2));
            // Some columns twice, some never.
            let places: Vec<u32> = (0..r + n).map(|j| ((j * 5 + seed * 13 + j * seed) % (r + n)) as u32).collect();
            let places = Tensor::new(places, &Device::Cpu).unwrap();
            let found = columns_of_both(&left, &right, &places).unwrap();
            let expected = elsewhere(|| columns_of_both(&left, &right, &places).unwrap());
            prop_assert_eq!(to_host(&found).unwrap(), to_host(&expected).unwrap());
            for (found, expected) in gradients(&found, [&left, &right]).iter().zip(gradients(&expected, [&left, &right])) {
                expect_close(found, &expected);
            }
        }
    }

    proptest! {
        #[test]
        fn slices_are_mixed_as_in_the_portable_form_in_values_and_gradients(
            (count, rows, rank) in (1usize..5, 1usize..6, 1usize..6),
        ) {
            let (x, scales) = (variable(count * rows, rank, 1), variable(count * count, rank, 2));
            let slices = x.reshape((count, rows, rank)).unwrap();
            let found = mixed_slices(&slices, &scales).unwrap();
            let expected = elsewhere(|| mixed_slices(&slices, &scales).unwrap());
            expect_close(&to_host(&found).unwrap(), &to_host(&expected).unwrap());
            for (found, expected) in gradients(&found, [&x, &scales]).iter().zip(gradients(&expected, [&x, &scales])) {
                expect_close(found, &expected);
            }
        }
    }

    #[test]
    fn gradients_of_constants_are_not_computed_and_shapes_are_checked() {
        let (x, weight) = (variable(3, 4, 1), variable(5, 4, 2));
        let y = product(&x, &weight.as_detached_tensor()).unwrap();
        let store = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        assert!(store.get(&x).is_some() && store.get(&weight).is_none());
        assert!(product(&x, &variable(5, 3, 2)).is_err());
        let places = Tensor::new(&[7u32], &Device::Cpu).unwrap();
        assert!(columns_of_both(&variable(2, 3, 1), &variable(2, 4, 2), &places).is_err());
        let slices = variable(4, 3, 1).reshape((2, 2, 3)).unwrap();
        assert!(mixed_slices(&slices, &variable(3, 3, 2)).is_err());
    }
}
