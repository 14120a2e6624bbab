//! The parts of a block that may become narrower, and what becomes of the tensors and the config then: channels of a
//! feed-forward layer or of an expert, and groups of heads, a head of keys and values with the heads of queries that it
//! serves. An expert without channels is left out.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::architectures::table::{Architecture, HeadCounts};
use super::config::ModelConfig;
use super::inventory::{LinearInfo, Stored};
use super::slot::{LinearId, Role, Slot};
use super::text_config;
use super::widths::Widths;

/// What a unit is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum UnitKind {
    /// Channels of a feed-forward layer.
    Channels,
    /// Groups of heads.
    Groups,
    /// Channels of an expert, which is left out with the last of them.
    Experts,
}

/// A part of a block that may become narrower.
#[derive(Debug, Clone)]
pub struct NarrowUnit {
    /// Index of the block.
    pub block: usize,
    /// What it is made of.
    pub kind: UnitKind,
    /// The expert that it is.
    pub expert: Option<usize>,
    /// The linears that make its values, which lose rows.
    pub makers: Vec<LinearInfo>,
    /// The linear that reads them, which loses columns.
    pub reader: LinearInfo,
    widths: Widths,
}

impl UnitKind {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Channels => "channels",
            Self::Groups => "groups",
            Self::Experts => "experts",
        }
    }

    /// The roles of the linears that make its values, and of the linear that reads them.
    fn roles(self) -> (&'static [Role], Role) {
        match self {
            Self::Channels | Self::Experts => (&[Role::GateProj, Role::UpProj, Role::GateUpProj], Role::DownProj),
            Self::Groups => (&[Role::QProj, Role::KProj, Role::VProj, Role::QkvProj], Role::OProj),
        }
    }
}

impl NarrowUnit {
    /// Its name within its block: `channels`, `groups` or `experts.7`.
    pub fn name(&self) -> String {
        match self.expert {
            None => self.kind.name().into(),
            Some(expert) => format!("{}.{expert}", self.kind.name()),
        }
    }

    /// Number of channels or groups.
    pub fn width(&self) -> usize {
        match self.kind {
            UnitKind::Channels => self.widths.intermediate_size,
            UnitKind::Groups => self.widths.num_key_value_heads,
            UnitKind::Experts => self.widths.moe_intermediate_size,
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
                widths.num_attention_heads = self.heads(kept);
                widths.num_key_value_heads = kept;
            }
            UnitKind::Experts if kept == 0 => widths.num_experts -= 1,
            UnitKind::Experts => widths.moe_intermediate_size = kept,
        }
    }

    /// Heads of queries in so many groups.
    pub fn heads(&self, groups: usize) -> usize {
        groups * self.widths.num_attention_heads / self.widths.num_key_value_heads
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

    /// The channel or group that each row of a maker belongs to.
    ///
    /// # Panics
    /// If the linear does not belong to a block.
    pub fn owners(&self, maker: &LinearInfo, architecture: &Architecture) -> Vec<usize> {
        let role = maker.id.expect("invariant: linears of a unit have a role").slot.role;
        let mut owners: Vec<usize> = (0..maker.out_features).map(|row| row / self.rows_each(role)).collect();
        for &(slice, _) in role.slices() {
            let rows = architecture.rows_of(slice, &self.widths).into_iter().flat_map(|rows| rows.indices());
            rows.enumerate().for_each(|(i, row)| owners[row] = i / self.rows_each(slice));
        }
        owners
    }

    /// Rows of a linear of this role in one channel or group.
    fn rows_each(&self, role: Role) -> usize {
        self.widths.shape(Slot { role, expert: self.expert }).0[0] / self.width()
    }
}

/// Every index of runs of `run`.
fn runs(kept: &[usize], run: usize) -> Vec<usize> {
    kept.iter().flat_map(|&at| at * run..(at + 1) * run).collect()
}

/// The units of a model whose linears are all among `linears`, by block. Heads whose number other tensors or loaders fix
/// are none; the experts of a block are all units, or none of them is.
pub fn units(linears: &[LinearInfo], config: &ModelConfig, architecture: &Architecture) -> Vec<NarrowUnit> {
    let dense = linears.iter().filter(|linear| !linear.is_low_rank());
    let by_place: BTreeMap<LinearId, &LinearInfo> = dense.filter_map(|linear| Some((linear.id?, linear))).collect();
    let of_experts = architecture.experts.as_ref().map_or(&[][..], |names| names.linears);
    let unit = |block: usize, kind: UnitKind, expert: Option<usize>| {
        let (makers, reader) = kind.roles();
        let widths = config.widths(block);
        let (is_possible, family) = match kind {
            UnitKind::Channels => (widths.num_experts == 0, architecture.linears),
            UnitKind::Groups => (architecture.head_counts != HeadCounts::Fixed, architecture.linears),
            UnitKind::Experts => (true, of_experts),
        };
        let find = |role: Role| by_place.get(&LinearId { block, slot: Slot { role, expert } }).copied().cloned();
        let makers = makers.iter().filter(|role| family.iter().any(|(own, _)| own == *role));
        let makers = makers.map(|&role| find(role)).collect::<Option<Vec<_>>>();
        let makers = makers.filter(|makers| is_possible && !makers.is_empty())?;
        Some(NarrowUnit { block, kind, expert, makers, reader: find(reader)?, widths })
    };
    let mut units = Vec::new();
    for block in 0..config.num_hidden_layers {
        units.extend([UnitKind::Groups, UnitKind::Channels].into_iter().filter_map(|kind| unit(block, kind, None)));
        let experts = 0..config.widths(block).num_experts;
        let experts = experts.map(|expert| unit(block, UnitKind::Experts, Some(expert))).collect::<Option<Vec<_>>>();
        units.extend(experts.into_iter().flatten());
    }
    units
}

/// The experts of each block that stay if its units keep these channels, for blocks that lose one.
pub fn experts_that_stay(units: &[NarrowUnit], kept: &[Vec<usize>]) -> BTreeMap<usize, Vec<usize>> {
    let mut by_block: BTreeMap<usize, (usize, Vec<usize>)> = BTreeMap::new();
    for (unit, kept) in units.iter().zip(kept) {
        let Some(expert) = unit.expert else { continue };
        let (all, stay) = by_block.entry(unit.block).or_default();
        *all += 1;
        stay.extend((!kept.is_empty()).then_some(expert));
    }
    by_block.into_iter().filter(|(_, (all, stay))| stay.len() < *all).map(|(block, (_, stay))| (block, stay)).collect()
}

/// The dimension of a stored weight that counts the rows of the linear.
pub fn row_dimension(linear: &LinearInfo) -> usize {
    usize::from(linear.stored == Stored::DenseTransposed)
}

/// The dimension of a stored weight that counts the columns of the linear.
pub fn column_dimension(linear: &LinearInfo) -> usize {
    1 - row_dimension(linear)
}

/// A config whose blocks have these `widths`. A number that all blocks share is a field of the model if loaders take it
/// there, others are in `per_layer_config`.
pub fn narrowed_config(
    config: &Map<String, Value>,
    architecture: &Architecture,
    model: &ModelConfig,
    widths: &[Widths],
) -> Map<String, Value> {
    let (mut config, source) = (config.clone(), model.block_widths().common());
    let takes = |heads: usize| architecture.head_counts.allow(heads, model.hidden_size);
    let takes_heads = widths.first().is_none_or(|first| takes(first.num_attention_heads));
    let fields = text_config::fields_mut(&mut config);
    let mut by_block = fields.get("per_layer_config").and_then(Value::as_object).cloned().unwrap_or_default();
    let is_given = fields.contains_key("moe_intermediate_size");
    let names = |ours: &'static str| {
        // Where all blocks have experts, these may have the field of other blocks.
        let ours = if ours == "moe_intermediate_size" && !is_given { "intermediate_size" } else { ours };
        let theirs = architecture.aliases.iter().find(|(_, name)| *name == ours).map_or(ours, |(theirs, _)| theirs);
        [theirs, ours]
    };
    for (name, number, has) in NUMBERS {
        let [theirs, ours] = names(name);
        let of_block: Vec<(usize, usize)> =
            widths.iter().enumerate().filter(|(_, own)| has(own)).map(|(block, own)| (block, number(own))).collect();
        let Some(&(_, first)) = of_block.first() else { continue };
        let is_shared = of_block.iter().all(|(_, own)| *own == first) && (takes_heads || !ours.ends_with("_heads"));
        let common = if is_shared { first } else { number(source) };
        if common != number(source) {
            fields.insert(theirs.into(), common.into());
            // Some configs have both names.
            if fields.contains_key(ours) {
                fields.insert(ours.into(), common.into());
            }
        }
        for (block, own) in &of_block {
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

/// A number of a block, and whether a block has it.
type Number = fn(&Widths) -> usize;
type Has = fn(&Widths) -> bool;

/// The fields of a config that may become smaller, the number that each has, and the blocks that read it.
const NUMBERS: [(&str, Number, Has); 5] = [
    ("intermediate_size", |widths| widths.intermediate_size, |widths| widths.num_experts == 0),
    ("num_attention_heads", |widths| widths.num_attention_heads, |_| true),
    ("num_key_value_heads", |widths| widths.num_key_value_heads, |_| true),
    ("moe_intermediate_size", |widths| widths.moe_intermediate_size, |widths| widths.num_experts > 0),
    ("num_experts", |widths| widths.num_experts, |widths| widths.num_experts > 0),
];

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::architectures;
    use super::*;

    /// Rows of one channel or group alone are those that it owns, in fused matrices too.
    #[test]
    fn owners_are_the_channels_whose_rows_stay() {
        for fixture in ["tiny-llama", "pico/phi3", "pico/gpt_neox", "pico/mixtral"] {
            let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(fixture);
            let checkpoint = crate::checkpoint::Checkpoint::open(&root).unwrap();
            let (config, architecture) = ModelConfig::of(&checkpoint).unwrap();
            let units = units(&super::super::inventory::linears(&checkpoint), &config, architecture);
            assert!(!units.is_empty());
            for unit in &units {
                for maker in &unit.makers {
                    let owners = unit.owners(maker, architecture);
                    assert!(owners.len() == maker.out_features && owners.iter().max() == Some(&(unit.width() - 1)));
                    for k in [0, unit.width() - 1] {
                        let rows = unit.rows(maker, &[k], architecture);
                        assert!(!rows.is_empty() && rows.iter().all(|&row| owners[row] == k));
                        assert_eq!(rows.len(), owners.iter().filter(|&&owner| owner == k).count());
                    }
                }
            }
        }
    }

    /// 24 is a multiple of 2 heads and not of 5.
    #[test]
    fn numbers_of_heads_that_a_loader_refuses_are_those_of_blocks() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/pico-llama/config.json");
        let fields: Map<String, Value> = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let model = ModelConfig::parse(&fields, architectures::find("llama").unwrap(), &path).unwrap();
        let narrowed = |family: &str, heads: usize| {
            let own =
                Widths { num_attention_heads: heads, num_key_value_heads: heads, ..*model.block_widths().common() };
            let widths = vec![own; model.num_hidden_layers];
            narrowed_config(&fields, architectures::find(family).unwrap(), &model, &widths)
        };
        for (family, heads, is_shared) in [("llama", 2, true), ("llama", 5, false), ("mistral", 5, true)] {
            let config = narrowed(family, heads);
            let of_model = [&config["num_attention_heads"], &config["num_key_value_heads"]];
            let expected = if is_shared { [heads, heads] } else { [4, 2] };
            assert_eq!(of_model, expected.map(Value::from).each_ref(), "{family} {heads}");
            assert_eq!(config.contains_key("per_layer_config"), !is_shared, "{family} {heads}");
            assert_eq!(config["head_dim"], 8);
            if !is_shared {
                let by_block = config["per_layer_config"].as_object().unwrap();
                assert!(by_block.len() == model.num_hidden_layers && by_block["1"]["num_attention_heads"] == heads);
            }
        }
    }
}
