//! What each family records, op by op, and that both host executors agree on it.

use std::sync::Arc;

use crate::common::golden;
use exl_models::{BlockPart, block_plan};
use exl_tensor::{
    Bound, HostExecutor, KvBuffers, KvType, Phase, Plan, PlanKey, Side, Slot, StepBlock, StepSeq,
    check,
};

fn key(phase: Phase, rows: usize, seqs: usize, out_rows: usize) -> PlanKey {
    PlanKey {
        phase,
        rows,
        seqs,
        pages_per_seq: 1,
        out_rows,
        sample: None,
        extras: Default::default(),
    }
}

#[test]
fn plans_are_as_reviewed() {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path("../plans");
    settings.set_prepend_module_to_snapshot(false);
    settings.bind(|| {
        for case in ["llama-bias", "mistral-window", "qwen2-tied", "qwen3"] {
            let model = golden(case).model;
            let prefill = model.plan(&key(Phase::Prefill, 40, 1, 1));
            insta::assert_snapshot!(format!("{case}-prefill"), prefill);
            let decode = model.plan(&key(Phase::Decode, 2, 2, 2));
            insta::assert_snapshot!(format!("{case}-decode"), decode);
        }
        let spec = golden("llama-plain").model.spec().clone();
        let layer = block_plan(&spec, BlockPart::Layer(1), &key(Phase::Calibrate, 16, 1, 0));
        insta::assert_snapshot!("llama-plain-calibrate-layer", layer);
        let head = block_plan(&spec, BlockPart::Head, &key(Phase::Calibrate, 16, 1, 0));
        insta::assert_snapshot!("llama-plain-calibrate-head", head);
    });
}

#[test]
fn a_layer_takes_at_most_eight_launches() {
    for case in ["llama-plain", "qwen2", "mistral-window"] {
        let model = golden(case).model;
        let report = model.cost(&key(Phase::Decode, 1, 1, 1), KvType::F16, 100);
        assert!(
            report.launches <= 8 * model.spec().layers.len() + 4,
            "{case}"
        );
    }
}

#[test]
fn prefill_without_logits_has_no_head() {
    let plan = golden("llama-plain")
        .model
        .plan(&key(Phase::Prefill, 40, 1, 0));
    assert_eq!(plan.output("logits"), None);
    assert!(!plan.to_string().contains("lm_head"));
}

#[test]
fn kernels_agree_with_the_reference_slot_by_slot() {
    for case in ["llama-bias", "mistral-window", "qwen3"] {
        let golden = golden(case);
        let key = key(Phase::Prefill, golden.ids.len(), 1, 1);
        let bound = Bound::new(Arc::new(golden.model.plan(&key)), golden.model.weights()).unwrap();
        let mut step = StepBlock::new(&key).unwrap();
        let n = golden.ids.len();
        step.fill(&[StepSeq {
            tokens: &golden.ids,
            start: 0,
            pages: &[1],
            logits: (n - 1, n),
        }])
        .unwrap();
        let kv = || KvBuffers::new(golden.model.kv_shape(KvType::F32), 2).unwrap();
        let (mut cpu_kv, mut reference_kv) = (kv(), kv());
        let options = exl_tensor::CpuOptions {
            threads: 2,
            ..Default::default()
        };
        let mut cpu = HostExecutor::cpu(exl_tensor::Cpu::new(options)).unwrap();
        let mut reference = HostExecutor::reference().unwrap();
        let tested = Side {
            executor: &mut cpu,
            bound: &bound,
            kv: &mut cpu_kv,
        };
        let trusted = Side {
            executor: &mut reference,
            bound: &bound,
            kv: &mut reference_kv,
        };
        let report = check(tested, trusted, &step, &[], |_| 1e-5).unwrap();
        assert_eq!(report.first_failure(), None, "{case}");
        assert!(report.diffs.len() >= bound.plan().ops().len() - 2);
    }
}

/// The parts of the model chained over hidden states give what the whole gives.
#[test]
fn block_plans_chain_to_the_whole_model() {
    let golden = golden("qwen2-window");
    let (spec, weights) = (golden.model.spec(), golden.model.weights());
    let key = key(Phase::Calibrate, golden.ids.len(), 1, 0);
    let mut step = StepBlock::new(&key).unwrap();
    step.fill(&[StepSeq {
        tokens: &golden.ids,
        start: 0,
        pages: &[1],
        logits: (0, 0),
    }])
    .unwrap();
    let mut executor = HostExecutor::reference().unwrap();
    let mut run = |part: BlockPart, hidden: Option<&[f32]>| -> (Plan, Vec<f32>, Vec<Vec<f32>>) {
        use exl_tensor::Executor;
        let plan = block_plan(spec, part, &key);
        let bound = Bound::new(Arc::new(plan.clone()), weights).unwrap();
        let mut kv = KvBuffers::new(spec.block_kv_shape(KvType::F32), 2).unwrap();
        executor.prepare(&bound).unwrap();
        if let Some(hidden) = hidden {
            executor
                .write(&bound, plan.input("hidden").unwrap(), hidden)
                .unwrap();
        }
        executor.run(&bound, &step, &mut kv).unwrap();
        let out: Slot = plan.output("hidden").or(plan.output("logits")).unwrap();
        let taps = plan
            .taps()
            .iter()
            .map(|(_, s)| executor.slot(&bound, *s).to_vec())
            .collect();
        let values = executor.slot(&bound, out).to_vec();
        (plan, values, taps)
    };
    let (_, mut hidden, _) = run(BlockPart::Embed, None);
    for i in 0..spec.layers.len() {
        let (whole_plan, whole, whole_taps) = run(BlockPart::Layer(i), Some(&hidden));
        let (_, middle, mut taps) = run(BlockPart::Attention(i), Some(&hidden));
        let (_, after, mlp_taps) = run(BlockPart::Mlp(i), Some(&middle));
        taps.extend(mlp_taps);
        assert_eq!(whole, after);
        assert_eq!(whole_taps, taps);
        let names: Vec<&str> = whole_plan.taps().iter().map(|(n, _)| n.as_str()).collect();
        let sites: Vec<String> = exl_models::sites(spec)[4 * i..][..4]
            .iter()
            .map(|s| s.name.clone())
            .collect();
        assert_eq!(names, sites);
        hidden = after;
    }
    let (head, logits, taps) = run(BlockPart::Head, Some(&hidden));
    assert_eq!(
        (head.taps()[0].0.as_str(), taps[0].len()),
        ("lm_head", hidden.len())
    );
    assert!(golden.error(&logits) < 1e-4);
}
