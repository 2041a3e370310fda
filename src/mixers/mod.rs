pub mod lolcats;
