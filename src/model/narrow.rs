//! The parts of a block that may become narrower, and what becomes of the tensors and the config then: channels of a
//! feed-forward layer, and groups of heads, a head of keys and values with the heads of queries that it serves.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::architectures::table::Architecture;
use super::config::ModelConfig;
use super::inventory::{LinearInfo, Stored};
use super::slot::{Role, Slot};
use super::text_config;
use super::widths::Widths;

/// What a unit is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum UnitKind {
    /// Channels of a feed-forward layer.
    Channels,
    /// Groups of heads.
    Groups,
}

/// A part of a block that may become narrower.
#[derive(Debug, Clone)]
pub struct NarrowUnit {
    /// Index of the block.
    pub block: usize,
    /// What it is made of.
    pub kind: UnitKind,
    /// The linears that make its values, which lose rows.
    pub makers: Vec<LinearInfo>,
    /// The linear that reads them, which loses columns.
    pub reader: LinearInfo,
    widths: Widths,
}

impl UnitKind {
    /// Its name in reports: a channel of the feed-forward layer, or a group of heads.
    pub fn name(self) -> &'static str {
        match self {
            Self::Channels => "channels",
            Self::Groups => "groups",
        }
    }

    /// The roles of the linears that make its values, and of the linear that reads them.
    fn roles(self) -> (&'static [Role], Role) {
        match self {
            Self::Channels => (&[Role::GateProj, Role::UpProj, Role::GateUpProj], Role::DownProj),
            Self::Groups => (&[Role::QProj, Role::KProj, Role::VProj, Role::QkvProj], Role::OProj),
        }
    }
}

impl NarrowUnit {
    /// Number of channels or groups.
    pub fn width(&self) -> usize {
        match self.kind {
            UnitKind::Channels => self.widths.intermediate_size,
            UnitKind::Groups => self.widths.num_key_value_heads,
        }
    }

    /// Columns of the reader that a channel or a group has.
    pub fn run(&self) -> usize {
        self.reader.in_features / self.width()
    }

    /// Changes the widths of its block to those of a block with `kept` channels or groups.
    pub fn narrow(&self, widths: &mut Widths, kept: usize) {
        match self.kind {
            UnitKind::Channels => widths.intermediate_size = kept,
            UnitKind::Groups => {
                widths.num_attention_heads = kept * self.widths.num_attention_heads / self.widths.num_key_value_heads;
                widths.num_key_value_heads = kept;
            }
        }
    }

    /// All of its linears.
    pub fn linears(&self) -> impl Iterator<Item = &LinearInfo> {
        self.makers.iter().chain([&self.reader])
    }

    /// Parameters of its linears in one channel or group.
    pub fn parameters_each(&self) -> u64 {
        self.linears().map(LinearInfo::n_parameters).sum::<u64>() / self.width() as u64
    }

    /// Parameters of its linears.
    pub fn parameters(&self) -> u64 {
        self.width() as u64 * self.parameters_each()
    }

    /// Whether a block with these channels or groups, in this order, differs from the source.
    pub fn is_changed(&self, kept: &[usize]) -> bool {
        !kept.iter().copied().eq(0..self.width())
    }

    /// The columns of the reader that stay with these channels or groups, in their order.
    pub fn columns(&self, kept: &[usize]) -> Vec<usize> {
        runs(kept, self.run())
    }

    /// The rows of a maker that stay with these channels or groups, in their order; in the layout of the family if it has
    /// several linears in one.
    ///
    /// # Panics
    /// If the linear does not belong to a block.
    pub fn rows(&self, maker: &LinearInfo, kept: &[usize], architecture: &Architecture) -> Vec<usize> {
        let role = maker.id.expect("invariant: linears of a unit have a role").slot.role;
        let slices = role.slices();
        if slices.is_empty() {
            return runs(kept, self.rows_each(role));
        }
        let mut narrower = self.widths;
        self.narrow(&mut narrower, kept.len());
        let indices = |slice: Role, widths: &Widths| -> Vec<usize> {
            architecture.rows_of(slice, widths).into_iter().flat_map(|rows| rows.indices()).collect()
        };
        let mut rows: BTreeMap<usize, usize> = BTreeMap::new(); // by their places in the narrower matrix
        for &(slice, _) in slices {
            let all = indices(slice, &self.widths);
            let stay = runs(kept, self.rows_each(slice)).into_iter().map(|row| all[row]);
            rows.extend(indices(slice, &narrower).into_iter().zip(stay));
        }
        rows.into_values().collect()
    }

    /// Rows of a linear of this role in one channel or group.
    fn rows_each(&self, role: Role) -> usize {
        self.widths.shape(Slot::shared(role)).0[0] / self.width()
    }
}

/// Every index of runs of `run`.
fn runs(kept: &[usize], run: usize) -> Vec<usize> {
    kept.iter().flat_map(|&at| at * run..(at + 1) * run).collect()
}

/// The units of a model whose linears are all among `linears`, by block. Experts have none, and neither have heads
/// whose number other tensors or loaders fix.
pub fn units(linears: &[LinearInfo], config: &ModelConfig, architecture: &Architecture) -> Vec<NarrowUnit> {
    let mut by_place: BTreeMap<(usize, Role), &LinearInfo> = BTreeMap::new();
    for linear in linears.iter().filter(|linear| !linear.is_low_rank()) {
        if let Some(id) = linear.id.filter(|id| id.slot.expert.is_none()) {
            by_place.insert((id.block, id.slot.role), linear);
        }
    }
    let unit = |block: usize, kind: UnitKind| {
        let (makers, reader) = kind.roles();
        let widths = config.widths(block);
        let is_possible = match kind {
            UnitKind::Channels => widths.num_experts == 0,
            UnitKind::Groups => architecture.has_free_heads,
        };
        let makers = makers.iter().filter(|role| architecture.linears.iter().any(|(own, _)| own == *role));
        let makers = makers.map(|&role| by_place.get(&(block, role)).map(|&linear| linear.clone()));
        let makers = makers.collect::<Option<Vec<_>>>().filter(|makers| is_possible && !makers.is_empty())?;
        let reader = (*by_place.get(&(block, reader))?).clone();
        Some(NarrowUnit { block, kind, makers, reader, widths })
    };
    let kinds = [UnitKind::Groups, UnitKind::Channels];
    (0..config.num_hidden_layers)
        .flat_map(|block| kinds.into_iter().filter_map(move |kind| unit(block, kind)))
        .collect()
}

/// The dimension of a stored weight that counts the rows of the linear.
pub fn row_dimension(linear: &LinearInfo) -> usize {
    usize::from(linear.stored == Stored::DenseTransposed)
}

/// The dimension of a stored weight that counts the columns of the linear.
pub fn column_dimension(linear: &LinearInfo) -> usize {
    1 - row_dimension(linear)
}

/// A config whose blocks have these `widths`. A number that all blocks share is a field of the model, others are in
/// `per_layer_config`.
pub fn narrowed_config(
    config: &Map<String, Value>,
    architecture: &Architecture,
    source: &Widths,
    widths: &[Widths],
) -> Map<String, Value> {
    let mut config = config.clone();
    let fields = text_config::fields_mut(&mut config);
    let mut by_block = fields.get("per_layer_config").and_then(Value::as_object).cloned().unwrap_or_default();
    let names = |ours: &'static str| {
        let theirs = architecture.aliases.iter().find(|(_, name)| *name == ours).map_or(ours, |(theirs, _)| theirs);
        [theirs, ours]
    };
    for (name, number) in NUMBERS {
        let [theirs, ours] = names(name);
        let of_block: Vec<usize> = widths.iter().map(number).collect();
        let common = if of_block.iter().all(|own| *own == of_block[0]) { of_block[0] } else { number(source) };
        if common != number(source) {
            fields.insert(theirs.into(), common.into());
            // Some configs have both names.
            if fields.contains_key(ours) {
                fields.insert(ours.into(), common.into());
            }
        }
        for (block, own) in of_block.iter().enumerate() {
            let entry = by_block.entry(block.to_string()).or_insert_with(|| Map::new().into());
            let Some(entry) = entry.as_object_mut() else { continue };
            [theirs, ours].iter().for_each(|name| drop(entry.shift_remove(*name)));
            if *own != common {
                entry.insert(theirs.into(), (*own).into());
            }
        }
    }
    if widths.iter().any(|own| own.num_attention_heads != source.num_attention_heads) {
        fields.insert(names("head_dim")[0].into(), source.head_dim.into());
    }
    by_block.retain(|_, own| own.as_object().is_none_or(|own| !own.is_empty()));
    match by_block.is_empty() {
        true => drop(fields.shift_remove("per_layer_config")),
        false => drop(fields.insert("per_layer_config".into(), by_block.into())),
    }
    config
}

/// A number of a block.
type Number = fn(&Widths) -> usize;

/// The fields of a config that may become smaller, and the number that each has.
const NUMBERS: [(&str, Number); 3] = [
    ("intermediate_size", |widths| widths.intermediate_size),
    ("num_attention_heads", |widths| widths.num_attention_heads),
    ("num_key_value_heads", |widths| widths.num_key_value_heads),
];
