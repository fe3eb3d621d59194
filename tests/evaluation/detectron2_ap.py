"""What the evaluators of the real Detectron2 say of the golden set. Importing it needs Detectron2."""

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from golden_set import dataset_dicts, outputs_of, register, write_voc_folder


def measure(golden, folder):
    """{"coco": {AP, AP50, ..., AP-<class>}, "voc07": AP50, "voc": AP50}, in percent."""
    catalogs = (DatasetCatalog, MetadataCatalog)
    dicts = dataset_dicts(golden, difficult_is_crowd=True)
    register("golden_d2_coco", dicts, golden["classes"], catalogs)
    evaluator = COCOEvaluator(
        "golden_d2_coco",
        tasks=("bbox",),
        distributed=False,
        output_dir=str(folder / "coco"),
        use_fast_impl=False,
    )
    result = {"coco": dict(_run(evaluator, golden))}
    write_voc_folder(golden, folder / "voc")
    for kind, year in (("voc07", 2007), ("voc", 2012)):
        name = f"golden_d2_{kind}"
        voc = {"dirname": str(folder / "voc"), "split": "golden", "year": year}
        register(name, dicts, golden["classes"], catalogs, **voc)
        result[kind] = float(_run(PascalVOCDetectionEvaluator(name), golden)["AP50"])
    return result


def _run(evaluator, golden):
    evaluator.reset()
    for source, output in outputs_of(golden):
        evaluator.process([source], [output])
    return evaluator.evaluate()["bbox"]
