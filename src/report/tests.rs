use super::*;

#[test]
fn older_names_of_fields_are_read() {
    let names = ["calibrate_forward", "calibrate_backward", "decompose", "allocate", "anchor", "write"];
    let mut fields: serde_json::Map<String, Value> = names.iter().map(|name| ((*name).into(), 0.0.into())).collect();
    fields.extend([("quantise".into(), 1.0.into()), ("control".into(), 2.0.into())]);
    let Timings { quantize, equal_bytes_baseline, .. } = serde_json::from_value(fields.into()).unwrap();
    assert_eq!((quantize, equal_bytes_baseline), (1.0, 2.0));
}

#[test]
#[cfg(target_os = "linux")]
fn peak_memory_is_read() {
    assert!(peak_memory_bytes().unwrap() > 1 << 20);
}
