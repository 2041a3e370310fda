//! Safetensors files made by hand, byte by byte, so that they can be broken in every way.

/// A safetensors file from the text of its header and its data.
pub fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

/// Tensor `name` of F32 `values` as a vector.
pub fn one_tensor(name: &str, values: &[f32]) -> Vec<u8> {
    let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let (count, end) = (values.len(), data.len());
    safetensors(&format!(r#"{{"{name}":{{"dtype":"F32","shape":[{count}],"data_offsets":[0,{end}]}}}}"#), &data)
}
