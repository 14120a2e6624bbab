//! The weight itself, (out, in): a base, or an uncompressed weight.

use anyhow::Result;
use candle_core::Tensor;

use super::matrix::Matrix;
use super::products::product;
use super::structure::{Element, Shape, Size, Step, Structure};

pub(super) struct Dense;

impl Structure for Dense {
    fn name(&self) -> &'static str {
        "dense"
    }

    fn suffixes(&self) -> &'static [(&'static str, Element)] {
        &[("", Element::Float)]
    }

    fn shapes(&self, _: Size, (m, n): Shape) -> Vec<[usize; 2]> {
        vec![[m, n]]
    }

    fn measure(&self, stored: &[[usize; 2]]) -> Option<(Size, Shape)> {
        let &[[m, n]] = stored else { return None };
        Some((Size::Whole, (m, n)))
    }

    fn apply(&self, parts: &[Tensor], x: &Tensor) -> Result<Tensor> {
        product(x, &parts[0])
    }

    fn product(&self, parts: &[Matrix], _: Size, _: Shape) -> Vec<f32> {
        parts[0].values().into_owned()
    }

    fn steps(&self, _: Size) -> Vec<Step> {
        vec![Step::Multiply(0)]
    }
}
