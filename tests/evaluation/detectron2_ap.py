"""What the evaluators of the real Detectron2 say of the golden set. Importing it needs Detectron2.

`python tests/evaluation/detectron2_ap.py` writes that into golden_ap.json: 8 images of random objects, whose
detections are jittered objects, duplicates and noise, with boxes of one decimal and scores of three, all
different, as Detectron2's VOC evaluator writes them.
"""

import json
import tempfile
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from golden_set import GOLDEN_PATH, dataset_dicts, evaluate, load_golden, outputs_of, write_voc_folder


def measure(golden, folder):
    """{"coco": {AP, AP50, ..., AP-<class>}, "voc07": AP50, "voc": AP50}, in percent."""
    write_voc_folder(golden, folder / "voc")
    dicts = dataset_dicts(golden, difficult_key="iscrowd")
    for name, year in (("coco", 0), ("voc07", 2007), ("voc", 2012)):
        DatasetCatalog.pop(f"golden_d2_{name}", None)
        MetadataCatalog.pop(f"golden_d2_{name}", None)
        DatasetCatalog.register(f"golden_d2_{name}", lambda: dicts)
        metadata = {"dirname": str(folder / "voc"), "split": "golden", "year": year} if year else {}
        MetadataCatalog.get(f"golden_d2_{name}").set(thing_classes=list(golden["classes"]), **metadata)
    options = {"tasks": ("bbox",), "distributed": False, "use_fast_impl": False}
    coco = COCOEvaluator("golden_d2_coco", output_dir=str(folder / "coco"), **options)
    result = {"coco": dict(evaluate(coco, outputs_of(golden)))}
    for kind in ("voc07", "voc"):
        voc = evaluate(PascalVOCDetectionEvaluator(f"golden_d2_{kind}"), outputs_of(golden))
        result[kind] = float(voc["AP50"])
    return result


if __name__ == "__main__":
    golden = load_golden()
    with tempfile.TemporaryDirectory() as scratch:
        golden["expected"] = measure(golden, Path(scratch))
    GOLDEN_PATH.write_text(json.dumps(golden) + "\n", encoding="utf-8")
    print(json.dumps(golden["expected"], indent=1))
