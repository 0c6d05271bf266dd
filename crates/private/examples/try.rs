use tercet_private::accounting::*;
fn main() {
    let a: Vec<f64> = std::env::args().skip(1).map(|x| x.parse().unwrap()).collect();
    let p = Phase::new(a[0], a[1], a[2] as u64).unwrap();
    let t = std::time::Instant::now();
    let e = pld::epsilon(&[p], a[3]).unwrap();
    println!("{:?} {:?}", e, t.elapsed());
    println!("rdp {:?}", rdp::epsilon(&[p], a[3], &rdp::default_orders()));
}
