//! What holds on any machine, with a device or without.

use tercet_cuda::{Error, Library, Source, compile_for, look_for, probe};

#[test]
fn a_machine_without_a_driver_is_told_what_is_missing_and_where_it_was_looked_for() {
    match probe() {
        Ok(devices) => assert!(!devices.is_empty()),
        Err(Error::Missing { name, looked }) => {
            assert_eq!(name, "libcuda");
            assert!(looked.contains("libcuda.so"), "{looked}");
            assert!(probe().unwrap_err().is_users());
        }
        Err(e) => assert!(e.is_users(), "{e}"),
    }
}

#[test]
fn a_kernel_compiles_for_its_constants_or_says_why_not() {
    if let Err(e) = look_for(Library::Nvrtc) {
        println!("skipped: {e}");
        return;
    }
    const GOOD: Source = Source::new(
        "good",
        "#include \"types.cuh\"\nKERNEL good(Real* x) { x[threadIdx.x] = narrow<Real>(FACTOR); }",
    );
    let factor = |x: &str| [("REAL_BF16", "1".to_owned()), ("FACTOR", x.to_owned())];
    let one = compile_for(&GOOD, (9, 0), &factor("1.0f")).unwrap();
    let two = compile_for(&GOOD, (9, 0), &factor("2.0f")).unwrap();
    assert!(one.starts_with(b"\x7fELF"));
    assert_ne!(one, two);
    compile_for(&GOOD, (8, 0), &factor("1.0f")).unwrap();

    const BAD: Source = Source::new("bad", "__global__ void bad() { nothing(); }");
    match compile_for(&BAD, (9, 0), &[]) {
        Err(Error::Compile { name, log, .. }) => {
            assert_eq!(name, "bad");
            assert!(log.contains("nothing"), "{log}");
        }
        other => panic!("{other:?}"),
    }
}
