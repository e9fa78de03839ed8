//! A TD's end: with pages left, in the one order in which it can be done; and its memory is nobody else's, before and after.
#![expect(clippy::unwrap_used, reason = "in a test the panic is the message")]

mod common;

use common::{Host, LP, Stage, at, rcx, status};
use premap_tdx_module::{Class, Gpa, Hkid, HostAccessError, Hpa, Level, PageType, Seamcall, TdField};

const GPA: u64 = 0x4000_0000;

/// Reclaims every page of a TD but its TDR.
fn reclaim_all(host: &Host, tdr: Hpa) -> u64 {
    let pages = (0..16384_u64).map(|page| Hpa::new(common::TDMR + (page << 12)));
    let mut reclaimed = 0;
    for page in pages {
        let record = host.module.page_record(page.frame()).unwrap();
        if record.owner == Some(tdr.frame()) && page.raw().is_multiple_of(record.level.bytes()) {
            let out = host.module.phymem_page_reclaim(page).unwrap();
            assert_eq!((out.kind, out.level, out.owner), (record.kind, record.level, record.owner));
            reclaimed += record.level.pages();
        }
    }
    reclaimed
}

#[test]
fn a_td_with_pages_left_is_torn_down_in_order() {
    let host = Host::new();
    let td = host.td(Stage::Runnable);
    let (tdr, module) = (td.tdr, &host.module);
    let small = host.aug(tdr, GPA, Level::PT);
    let large = host.aug(tdr, GPA + (2 << 20), Level::PD);
    let children = module.mng_rd(tdr, TdField::ChildCount).unwrap();

    let not_yet = Class::LIFECYCLE_STATE_INCORRECT.status();
    assert_eq!(status(module.phymem_page_reclaim(small)), not_yet);
    assert_eq!(status(module.phymem_page_reclaim(tdr)), not_yet);
    assert_eq!(status(module.mng_key_freeid(tdr)), not_yet);
    assert_eq!(status(module.mng_vpflushdone(tdr)), Class::FLUSHVP_NOT_DONE.status());
    module.vp_flush(LP, td.vcpus[0]).unwrap();
    module.mng_vpflushdone(tdr).unwrap();
    assert_eq!(status(module.mng_vpflushdone(tdr)), not_yet);
    assert_eq!(status(module.vp_enter(LP, td.vcpus[0], |_| ())), Class::TD_KEYS_NOT_CONFIGURED.status());
    assert_eq!(status(module.vp_flush(LP, td.vcpus[0])), Class::TD_KEYS_NOT_CONFIGURED.status());
    assert_eq!(status(module.mem_track(tdr)), Class::TD_KEYS_NOT_CONFIGURED.status());
    assert_eq!(status(module.phymem_page_reclaim(small)), not_yet);
    assert_eq!(status(module.mng_create(host.page(), td.hkid)), Class::HKID_NOT_FREE.status());
    module.mng_key_freeid(tdr).unwrap();
    assert_eq!(status(module.mng_key_freeid(tdr)), not_yet);

    assert_eq!(status(module.phymem_page_reclaim(tdr)), Class::TD_ASSOCIATED_PAGES_EXIST.status());
    assert_eq!(status(module.phymem_page_reclaim(large.wrapping_add(0x1000))), rcx(Class::OPERAND_INVALID));
    let reclaimed = module.phymem_page_reclaim(large).unwrap();
    assert_eq!((reclaimed.kind, reclaimed.level), (PageType::Regular, Level::PD));
    assert_eq!(status(module.phymem_page_reclaim(large)), rcx(Class::PAGE_METADATA_INCORRECT));
    assert_eq!(reclaim_all(&host, tdr), children - 512);
    assert_eq!(module.child_count(tdr), Ok(0));
    assert_eq!(module.phymem_page_reclaim(tdr).unwrap().kind, PageType::Tdr);
    assert_eq!(status(module.mem_track(tdr)), rcx(Class::PAGE_METADATA_INCORRECT));
    // Page and HKID are free for the next.
    module.mng_create(tdr, td.hkid).unwrap();
    assert_eq!(module.child_count(tdr), Ok(0));
}

#[test]
fn a_td_that_was_never_built_ends_too() {
    let host = Host::new();
    let tdr = host.td(Stage::Created).tdr;
    host.module.mng_vpflushdone(tdr).unwrap();
    host.module.mng_key_freeid(tdr).unwrap();
    host.module.phymem_page_reclaim(tdr).unwrap();
}

#[test]
fn a_new_td_in_an_old_ones_pages_starts_over() {
    let host = Host::new();
    let td = host.td(Stage::Runnable);
    let mrtd = host.module.mng_rd_mrtd(td.tdr).unwrap();
    host.module.vp_flush(LP, td.vcpus[0]).unwrap();
    host.module.mng_vpflushdone(td.tdr).unwrap();
    host.module.mng_key_freeid(td.tdr).unwrap();
    reclaim_all(&host, td.tdr);
    host.module.phymem_page_reclaim(td.tdr).unwrap();
    let old = td.vcpus[0];
    host.module.mng_create(td.tdr, Hkid(60)).unwrap();
    host.module.mng_key_config(td.tdr, premap_tdx_module::Package(0)).unwrap();
    assert_eq!(status(host.module.mng_rd(td.tdr, TdField::Epoch)), Class::TDCS_NOT_ALLOCATED.status());
    (0..6).for_each(|_| host.module.mng_addcx(host.page(), td.tdr).unwrap());
    host.module.mng_init(td.tdr, Hpa::new(0x400)).unwrap();
    assert_eq!(host.module.mng_rd(td.tdr, TdField::Vcpus), Ok(0));
    assert_eq!(status(host.module.vp_init(LP, old, 0, 0)), rcx(Class::PAGE_METADATA_INCORRECT));
    host.add(td.tdr, GPA, 1);
    assert_ne!(host.module.mng_rd_mrtd(td.tdr), Ok(mrtd));
}

#[test]
fn a_reclaim_waits_for_teardown_whatever_the_page_is() {
    let host = Host::new();
    let td = host.td(Stage::Runnable);
    host.aug(td.tdr, GPA, Level::PT);
    for page in 0..16384_u64 {
        let page = Hpa::new(common::TDMR + (page << 12));
        let expected = match host.module.page_record(page.frame()).unwrap().kind {
            PageType::Nda | PageType::Reserved => rcx(Class::PAGE_METADATA_INCORRECT),
            _ => Class::LIFECYCLE_STATE_INCORRECT.status(),
        };
        assert_eq!(status(host.module.phymem_page_reclaim(page)), expected, "{page}");
    }
    assert_eq!(status(host.module.phymem_page_reclaim(Hpa::new(0))), rcx(Class::OPERAND_ADDR_RANGE_ERROR));
    assert_eq!(status(host.module.phymem_page_reclaim(Hpa::new(8))), rcx(Class::OPERAND_INVALID));
}

#[test]
fn cache_lines_are_written_back_of_free_pages_only() {
    let host = Host::new();
    let td = host.td(Stage::Initialized);
    let module = &host.module;
    let free = module.keys().address(host.page(), td.hkid);
    module.phymem_page_wbinvd(free).unwrap();
    let taken = module.keys().address(td.tdr, td.hkid);
    assert_eq!(status(module.phymem_page_wbinvd(taken)), rcx(Class::PAGE_METADATA_INCORRECT));
    assert_eq!(status(module.phymem_page_wbinvd(Hpa::new(0))), rcx(Class::OPERAND_ADDR_RANGE_ERROR));
    assert_eq!(status(module.phymem_page_wbinvd(Hpa::new(1 << 52))), rcx(Class::OPERAND_INVALID));
}

#[test]
fn no_call_gives_the_host_a_tds_memory() {
    let host = Host::new();
    let td = host.td(Stage::WithVcpu);
    let (tdr, module) = (td.tdr, &host.module);
    let secret = [0x5a; 4096];
    let added = host.add(tdr, GPA, 1);
    let pending = host.aug(tdr, GPA + 0x1000, Level::PT);
    module.mr_finalize(tdr).unwrap();
    let keep = |guest: &premap_tdx_module::Guest<'_>| {
        guest.accept(at(GPA + 0x1000, Level::PT))?;
        guest.write(Gpa::new(GPA), &secret)?;
        guest.write(Gpa::new(GPA + 0x1000), &secret)
    };
    module.vp_enter(LP, td.vcpus[0], keep).unwrap().unwrap();
    let refused = |hpa: Hpa| {
        let mut bytes = [0; 4096];
        assert_eq!(module.host_read(hpa, &mut bytes), Err(HostAccessError::Private(hpa)));
        assert_eq!(bytes, [0; 4096]);
    };
    for page in [added, pending, tdr, td.vcpus[0]] {
        refused(page);
        assert_eq!(module.host_write(page, &[0]), Err(HostAccessError::Private(page)));
    }
    // Nor by way of another TD that the host knows: as a source, the page reads as zeros.
    let spy = host.td(Stage::Initialized);
    host.tables(spy.tdr, GPA, Level::PT);
    module.mem_page_add(at(GPA, Level::PT), spy.tdr, host.page(), added).unwrap();
    spy_reads_zeros(&host, &spy, GPA);

    // Nor after the page was removed, until the host has overwritten it.
    host.block_and_track(tdr, GPA, Level::PT);
    assert_eq!(module.mem_page_remove(at(GPA, Level::PT), tdr), Ok(added));
    refused(added);
    module.mem_page_add(at(GPA + 0x1000, Level::PT), spy.tdr, host.page(), added).unwrap_err();
    // Nor when it is given to another TD: it is added over, or accepted and so zero.
    module.mem_page_aug(at(GPA + 0x2000, Level::PT), tdr, added).unwrap();
    refused(added);
    host.block_and_track(tdr, GPA + 0x2000, Level::PT);
    module.mem_page_remove(at(GPA + 0x2000, Level::PT), tdr).unwrap();
    module.host_write(added.wrapping_add(9), &[7]).unwrap();
    let mut bytes = [1; 4096];
    module.host_read(added, &mut bytes).unwrap();
    assert_eq!((bytes[8], bytes[9], bytes[10]), (0, 7, 0));
}

/// Finalizes a TD and has its guest read a page.
fn spy_reads_zeros(host: &Host, spy: &common::Td, gpa: u64) {
    let vcpu = host.vcpu(spy.tdr, LP);
    host.module.mr_finalize(spy.tdr).unwrap();
    let read = |guest: &premap_tdx_module::Guest<'_>| {
        let mut bytes = [1; 4096];
        guest.read(Gpa::new(gpa), &mut bytes).map(|()| bytes)
    };
    assert_eq!(host.module.vp_enter(LP, vcpu, read).unwrap().unwrap(), [0; 4096]);
}

#[test]
fn the_hosts_memory_is_read_as_written_and_nowhere_else() {
    let host = Host::new();
    let module = &host.module;
    let text: Vec<u8> = (0..=255).cycle().take(9000).collect();
    let mut read = vec![0; 9000];
    for hpa in [Hpa::new(0x1ffb), host.large()] {
        module.host_write(hpa, &text).unwrap();
        module.host_read(hpa, &mut read).unwrap();
        assert_eq!(read, text);
    }
    let end = Hpa::new((1 << 20) - 4);
    assert_eq!(module.host_read(end, &mut [0; 8]), Err(HostAccessError::NoMemory(Hpa::new(1 << 20))));
}

#[test]
fn calls_are_counted_by_name() {
    let host = Host::new();
    let before = host.module.counts();
    let tdr = host.td(Stage::Initialized).tdr;
    host.module.mng_key_freeid(tdr).unwrap_err();
    let counts = host.module.counts().since(&before);
    assert_eq!((counts.of(Seamcall::MngAddcx).calls, counts.of(Seamcall::MngAddcx).refused), (6, 0));
    assert_eq!((counts.of(Seamcall::MngKeyFreeid).calls, counts.of(Seamcall::MngKeyFreeid).refused), (1, 1));
    let named: Vec<_> = counts.iter().map(|(call, count)| (call.name(), count.calls)).collect();
    assert!(named.contains(&("TDH.MNG.INIT", 1)));
    assert_eq!(counts.of(Seamcall::MemTrack).calls, 0);
    let mut leaves: Vec<u64> = Seamcall::ALL.iter().map(|call| call.leaf()).collect();
    leaves.sort_unstable();
    leaves.dedup();
    assert_eq!(leaves.len(), Seamcall::ALL.len());
}
