//! Pickles of PyTorch, read without executing anything: a stack machine over plain data. It knows the few functions
//! that make tensors and containers, as data; any other function that a pickle calls is refused by its name.

use std::collections::HashMap;

use super::super::cast::Dtype;

/// Why a pickle is not read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// It names something that is not a tensor, a storage or a container.
    Global(String),
    /// It is damaged, or holds something else than tensors by name. A clause.
    Broken(String),
}

impl From<&str> for Refusal {
    fn from(reason: &str) -> Self {
        Self::Broken(reason.into())
    }
}

/// A view of a storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// The name of the storage's file in the archive.
    pub key: String,
    /// The type of its elements.
    pub dtype: Dtype,
    /// Elements before the first.
    pub offset: usize,
    /// The shape.
    pub shape: Vec<usize>,
    /// Elements from one to the next, in each dimension.
    pub strides: Vec<usize>,
}

/// Everything that a pickle may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Global {
    Dict,
    Tuple,
    /// `_rebuild_tensor_v2`, with the dtype in the storage.
    Tensor,
    /// `_rebuild_tensor_v3`, with a dtype of its own.
    TypedTensor,
    /// A parameter is its tensor.
    Parameter,
    /// A class of storages; an untyped one has none.
    Storage(Option<Dtype>),
    Dtype(Dtype),
}

static GLOBALS: [(&str, &str, Global); 32] = [
    ("collections", "OrderedDict", Global::Dict),
    ("torch", "Size", Global::Tuple),
    ("torch._utils", "_rebuild_tensor_v2", Global::Tensor),
    ("torch._utils", "_rebuild_tensor_v3", Global::TypedTensor),
    ("torch._utils", "_rebuild_parameter", Global::Parameter),
    ("torch", "DoubleStorage", Global::Storage(Some(Dtype::F64))),
    ("torch", "FloatStorage", Global::Storage(Some(Dtype::F32))),
    ("torch", "HalfStorage", Global::Storage(Some(Dtype::F16))),
    ("torch", "BFloat16Storage", Global::Storage(Some(Dtype::BF16))),
    ("torch", "LongStorage", Global::Storage(Some(Dtype::I64))),
    ("torch", "IntStorage", Global::Storage(Some(Dtype::I32))),
    ("torch", "ShortStorage", Global::Storage(Some(Dtype::I16))),
    ("torch", "CharStorage", Global::Storage(Some(Dtype::I8))),
    ("torch", "ByteStorage", Global::Storage(Some(Dtype::U8))),
    ("torch", "BoolStorage", Global::Storage(Some(Dtype::BOOL))),
    ("torch", "UntypedStorage", Global::Storage(None)),
    ("torch.storage", "UntypedStorage", Global::Storage(None)),
    ("torch", "float64", Global::Dtype(Dtype::F64)),
    ("torch", "float32", Global::Dtype(Dtype::F32)),
    ("torch", "float16", Global::Dtype(Dtype::F16)),
    ("torch", "bfloat16", Global::Dtype(Dtype::BF16)),
    ("torch", "float8_e4m3fn", Global::Dtype(Dtype::F8_E4M3)),
    ("torch", "float8_e5m2", Global::Dtype(Dtype::F8_E5M2)),
    ("torch", "int64", Global::Dtype(Dtype::I64)),
    ("torch", "int32", Global::Dtype(Dtype::I32)),
    ("torch", "int16", Global::Dtype(Dtype::I16)),
    ("torch", "int8", Global::Dtype(Dtype::I8)),
    ("torch", "uint8", Global::Dtype(Dtype::U8)),
    ("torch", "uint16", Global::Dtype(Dtype::U16)),
    ("torch", "uint32", Global::Dtype(Dtype::U32)),
    ("torch", "uint64", Global::Dtype(Dtype::U64)),
    ("torch", "bool", Global::Dtype(Dtype::BOOL)),
];

/// The place of a value.
type Ref = usize;

#[derive(Debug)]
enum Value {
    /// Nothing that tensors are made of: none, floats, bytes.
    Other,
    Int(i64),
    Text(String),
    Tuple(Vec<Ref>),
    List(Vec<Ref>),
    Dict(Vec<(Ref, Ref)>),
    Global(Global),
    Storage(Option<Dtype>, String),
    Tensor(View),
}

/// Values that a pickle may make; models have some ten for each tensor.
const MOST: usize = 1 << 22;

/// The tensors of a pickle by name, in its order.
///
/// # Errors
/// It names what is not known, is damaged, or is not a table of tensors.
pub fn tensors(bytes: &[u8]) -> Result<Vec<(String, View)>, Refusal> {
    let mut machine =
        Machine { rest: bytes, values: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() };
    while machine.step()? {}
    let top = machine.pop()?;
    let Value::Dict(entries) = &machine.values[top] else {
        return Err("it holds no table of tensors by name".into());
    };
    let mut tensors = Vec::new();
    for &(key, value) in entries {
        let Value::Text(name) = &machine.values[key] else { return Err("a tensor has no name".into()) };
        let Value::Tensor(view) = &machine.values[value] else {
            return Err(Refusal::Broken(format!("its entry `{name}` is not a tensor")));
        };
        tensors.push((name.clone(), view.clone()));
    }
    Ok(tensors)
}

struct Machine<'a> {
    rest: &'a [u8],
    values: Vec<Value>,
    stack: Vec<Ref>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: HashMap<usize, Ref>,
}

impl<'a> Machine<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], Refusal> {
        let (bytes, rest) = self.rest.split_at_checked(n).ok_or("its table of tensors is cut off")?;
        self.rest = rest;
        Ok(bytes)
    }

    /// A number of `n` bytes, at most eight.
    fn number(&mut self, n: usize) -> Result<u64, Refusal> {
        let mut bytes = [0; 8];
        bytes[..n].copy_from_slice(self.take(n)?);
        Ok(u64::from_le_bytes(bytes))
    }

    fn text(&mut self, width: usize) -> Result<String, Refusal> {
        let n = usize::try_from(self.number(width)?).unwrap_or(usize::MAX);
        let text = std::str::from_utf8(self.take(n)?).map_err(|_| Refusal::from("a name in it is not UTF-8"))?;
        Ok(text.into())
    }

    fn line(&mut self) -> Result<String, Refusal> {
        let n = self.rest.iter().position(|&byte| byte == b'\n').ok_or("its table of tensors is cut off")?;
        let line = String::from_utf8_lossy(self.take(n)?).into_owned();
        self.take(1)?;
        Ok(line)
    }

    fn push(&mut self, value: Value) -> Result<(), Refusal> {
        if self.values.len() == MOST {
            return Err("it is larger than the table of any model".into());
        }
        self.stack.push(self.values.len());
        self.values.push(value);
        Ok(())
    }

    fn pop(&mut self) -> Result<Ref, Refusal> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err("it takes more values than it made".into());
        }
        self.stack.pop().ok_or_else(|| "it takes more values than it made".into())
    }

    fn top(&self) -> Result<Ref, Refusal> {
        self.stack.last().copied().ok_or_else(|| "it takes more values than it made".into())
    }

    fn until_mark(&mut self) -> Result<Vec<Ref>, Refusal> {
        let mark = self.marks.pop().ok_or("it ends a list that it did not begin")?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    /// Executes one instruction; false at the end.
    fn step(&mut self) -> Result<bool, Refusal> {
        match self.take(1)?[0] {
            b'.' => return Ok(false),
            0x80 => drop(self.take(1)?),
            0x95 => drop(self.take(8)?),
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'N' | 0x88 | 0x89 => self.push(Value::Other)?,
            b'G' => {
                self.take(8)?;
                self.push(Value::Other)?
            }
            b'}' => self.push(Value::Dict(Vec::new()))?,
            b']' => self.push(Value::List(Vec::new()))?,
            op @ (b'K' | b'M' | b'J' | 0x8a) => self.integer(op)?,
            op @ (b'X' | 0x8c | 0x8d | b'U' | b'T' | b'B' | b'C') => self.string(op)?,
            op @ (b')' | b't' | 0x85..=0x87) => self.tuple(op)?,
            op @ (b'q' | b'r' | 0x94 | b'h' | b'j') => self.remember(op)?,
            op @ (b's' | b'u' | b'a' | b'e') => self.fill(op)?,
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(&module, &name)?
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Value::Text(module), Value::Text(name)) = (&self.values[module], &self.values[name]) else {
                    return Err("it names something that is not a text".into());
                };
                let (module, name) = (module.clone(), name.clone());
                self.global(&module, &name)?
            }
            b'Q' => self.storage()?,
            // A class is called as a function is.
            b'R' | 0x81 => self.call()?,
            // Attributes of a container, such as versions of modules.
            b'b' => drop(self.pop()?),
            op => return Err(Refusal::Broken(format!("it has the instruction {op:#04x}, which no tensor needs"))),
        }
        Ok(true)
    }

    fn integer(&mut self, op: u8) -> Result<(), Refusal> {
        let value = match op {
            b'K' => self.number(1)? as i64,
            b'M' => self.number(2)? as i64,
            b'J' => i64::from(self.number(4)? as u32 as i32),
            _ => {
                let n = self.number(1)? as usize;
                if n > 8 {
                    return Err("it has a number of more than 64 bits".into());
                }
                let value = self.number(n)?;
                let unused = 64 - 8 * n as u32;
                if n == 0 { 0 } else { (value << unused) as i64 >> unused }
            }
        };
        self.push(Value::Int(value))
    }

    fn string(&mut self, op: u8) -> Result<(), Refusal> {
        match op {
            b'X' | b'T' => {
                let text = self.text(4)?;
                self.push(Value::Text(text))
            }
            0x8d => {
                let text = self.text(8)?;
                self.push(Value::Text(text))
            }
            0x8c | b'U' => {
                let text = self.text(1)?;
                self.push(Value::Text(text))
            }
            _ => {
                let n = self.number(if op == b'B' { 4 } else { 1 })? as usize;
                self.take(n)?;
                self.push(Value::Other)
            }
        }
    }

    fn tuple(&mut self, op: u8) -> Result<(), Refusal> {
        let items = match op {
            b')' => Vec::new(),
            b't' => self.until_mark()?,
            _ => {
                let mut items = (0x85..=op).map(|_| self.pop()).collect::<Result<Vec<_>, _>>()?;
                items.reverse();
                items
            }
        };
        self.push(Value::Tuple(items))
    }

    fn remember(&mut self, op: u8) -> Result<(), Refusal> {
        let at = match op {
            0x94 => self.memo.len(),
            b'q' | b'h' => self.number(1)? as usize,
            _ => self.number(4)? as usize,
        };
        if matches!(op, b'h' | b'j') {
            let value = *self.memo.get(&at).ok_or("it refers to a value that it did not make")?;
            self.stack.push(value);
            return Ok(());
        }
        let top = self.top()?;
        self.memo.insert(at, top);
        Ok(())
    }

    fn fill(&mut self, op: u8) -> Result<(), Refusal> {
        let items = match op {
            b'u' | b'e' => self.until_mark()?,
            b'a' => vec![self.pop()?],
            _ => {
                let (value, key) = (self.pop()?, self.pop()?);
                vec![key, value]
            }
        };
        let top = self.top()?;
        match &mut self.values[top] {
            Value::Dict(entries) if items.len().is_multiple_of(2) && matches!(op, b's' | b'u') => {
                entries.extend(items.as_chunks::<2>().0.iter().map(|&[key, value]| (key, value)));
                Ok(())
            }
            Value::List(list) if matches!(op, b'a' | b'e') => {
                list.extend(items);
                Ok(())
            }
            _ => Err("it fills something that is not a container".into()),
        }
    }

    fn global(&mut self, module: &str, name: &str) -> Result<(), Refusal> {
        let known = GLOBALS.iter().find(|(m, n, _)| (*m, *n) == (module, name));
        match known {
            Some((.., global)) => self.push(Value::Global(*global)),
            None => {
                let named: String = format!("{module}.{name}").chars().filter(|c| !c.is_control()).take(120).collect();
                Err(Refusal::Global(named))
            }
        }
    }

    /// A storage by its persistent id: (`storage`, class, key, device, number of elements).
    fn storage(&mut self) -> Result<(), Refusal> {
        let id = self.pop()?;
        let Value::Tuple(id) = &self.values[id] else { return Err("it has a storage without a key".into()) };
        let part = |at: usize| id.get(at).map(|&value| &self.values[value]);
        match (part(0), part(1), part(2)) {
            (Some(Value::Text(kind)), Some(Value::Global(Global::Storage(dtype))), Some(Value::Text(key)))
                if kind == "storage" =>
            {
                self.push(Value::Storage(*dtype, key.clone()))
            }
            _ => Err("it has a storage without a key".into()),
        }
    }

    fn call(&mut self) -> Result<(), Refusal> {
        let (args, callee) = (self.pop()?, self.pop()?);
        let (Value::Tuple(args), Value::Global(callee)) = (&self.values[args], &self.values[callee]) else {
            return Err("it calls something that is not a function".into());
        };
        let (args, callee) = (args.clone(), *callee);
        match (callee, args.as_slice()) {
            (Global::Dict, []) => self.push(Value::Dict(Vec::new())),
            (Global::Tensor | Global::TypedTensor, _) => {
                let view = self.view(callee, &args).ok_or("it describes a tensor that cannot be")?;
                self.push(Value::Tensor(view))
            }
            (Global::Parameter | Global::Tuple, &[of, ..]) => {
                self.stack.push(of);
                Ok(())
            }
            _ => Err("it calls a function with arguments that do not make a tensor".into()),
        }
    }

    /// The tensor of `_rebuild_tensor_v2` or `_rebuild_tensor_v3`.
    fn view(&self, callee: Global, args: &[Ref]) -> Option<View> {
        let value = |at: usize| args.get(at).map(|&value| &self.values[value]);
        let Value::Storage(stored, key) = value(0)? else { return None };
        let dtype = match (callee, value(6)) {
            (Global::TypedTensor, Some(Value::Global(Global::Dtype(dtype)))) => *dtype,
            (Global::TypedTensor, _) => return None,
            _ => (*stored)?,
        };
        let Value::Int(offset) = value(1)? else { return None };
        let (shape, strides) = (self.sizes(value(2)?)?, self.sizes(value(3)?)?);
        let offset = usize::try_from(*offset).ok()?;
        (shape.len() == strides.len()).then(|| View { key: key.clone(), dtype, offset, shape, strides })
    }

    fn sizes(&self, value: &Value) -> Option<Vec<usize>> {
        let Value::Tuple(sizes) = value else { return None };
        let size = |&size: &Ref| match self.values[size] {
            Value::Int(size) => usize::try_from(size).ok(),
            _ => None,
        };
        sizes.iter().map(size).collect()
    }
}
