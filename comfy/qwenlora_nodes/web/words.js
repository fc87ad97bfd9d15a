/** What our elements say, in the language that the person has chosen. */

import { app } from "../../scripts/app.js";

const EN = {
  "report.amber": "Something was left out",
  "report.blocked": "This node cannot run",
  "report.close": "Close",
  "report.complete": "Complete",
  "report.copied": "Copied",
  "report.copy": "Copy",
  "report.none": "the report comes with a run",
  "report.open": "Click for the whole report",
  "report.stale": "Inputs have changed since this run",
  "rows.add": "Add LoRA",
  "rows.all_off": "Switch all off",
  "rows.all_on": "Switch all on",
  "rows.choose": "choose a file",
  "rows.down": "Move down",
  "rows.drag": "Drag to move; with the keyboard: Alt+Up, Alt+Down",
  "rows.fallback": "The rows cannot be drawn here; their values are kept.",
  "rows.full": "There is room for {max} LoRAs; chain another stack for more",
  "rows.heading": "LoRA",
  "rows.missing": "{name}\nThis file is not in ComfyUI's list. Press R if it has just come.",
  "rows.none": "None",
  "rows.nothing_found": "no file's name fits",
  "rows.off": "Switched off",
  "rows.on": "Switched on",
  "rows.remove": "Remove",
  "rows.search": "part of a name or folder",
  "rows.shown": "{shown} of {all}: type to narrow it down",
  "rows.strength": "Strength",
  "rows.strength_hint": "Strength: type, drag sideways, or use the Up and Down keys",
  "rows.up": "Move up",
  "saved.add": "Add LoRA",
  "saved.ask": "Convert, although something is lost?",
  "saved.ask_more": "The new node has no place for:",
  "saved.clip_edge": "its clip goes straight through a subgraph: link it past the node first",
  "saved.convert_all": "Convert all {count} old LoRA nodes",
  "saved.convert_loader": "Convert to Load LoRA",
  "saved.convert_stack": "Convert to LoRA Stack",
  "saved.failed": "The node was not converted: {reason}",
  "saved.linked": "the link into {name}; its value here, {value}, is taken",
  "saved.modulation": "apply_awq_mod off; the modulation layers are applied",
  "saved.offload": "cpu_offload 'enable'; the model loader's setting decides",
  "saved.stack_off": "stack_enabled off; every row is switched off instead",
  "saved.too_many": "it has {rows} rows, a LoRA Stack holds {most}",
};

const ZH = {
  "report.amber": "有内容未被应用",
  "report.blocked": "此节点无法运行",
  "report.close": "关闭",
  "report.complete": "完整",
  "report.copied": "已复制",
  "report.copy": "复制",
  "report.none": "运行后显示报告",
  "report.open": "点击查看完整报告",
  "report.stale": "此次运行之后输入已更改",
  "rows.add": "添加 LoRA",
  "rows.all_off": "全部关闭",
  "rows.all_on": "全部开启",
  "rows.choose": "选择文件",
  "rows.down": "下移",
  "rows.drag": "拖动以移动；键盘：Alt+上、Alt+下",
  "rows.fallback": "此处无法绘制各行；其值会保留。",
  "rows.full": "最多 {max} 个 LoRA；需要更多时请再串联一个堆栈",
  "rows.heading": "LoRA",
  "rows.missing": "{name}\n此文件不在 ComfyUI 的列表中。若刚放入，请按 R 刷新。",
  "rows.none": "无",
  "rows.nothing_found": "没有匹配的文件名",
  "rows.off": "已关闭",
  "rows.on": "已开启",
  "rows.remove": "移除",
  "rows.search": "文件名或文件夹的一部分",
  "rows.shown": "显示 {all} 个中的 {shown} 个：输入以缩小范围",
  "rows.strength": "强度",
  "rows.strength_hint": "强度：可输入、左右拖动，或使用上下键",
  "rows.up": "上移",
  "saved.add": "添加 LoRA",
  "saved.ask": "会丢失部分设置，仍要转换吗？",
  "saved.ask_more": "新节点没有以下设置：",
  "saved.clip_edge": "其 clip 直接穿过子图：请先将其绕过此节点连接",
  "saved.convert_all": "转换全部 {count} 个旧 LoRA 节点",
  "saved.convert_loader": "转换为加载 LoRA",
  "saved.convert_stack": "转换为 LoRA 堆栈",
  "saved.failed": "节点未转换：{reason}",
  "saved.linked": "连到 {name} 的连线；采用此处的值 {value}",
  "saved.modulation": "apply_awq_mod 关闭；将应用调制层",
  "saved.offload": "cpu_offload 'enable'；由模型加载器的设置决定",
  "saved.stack_off": "stack_enabled 关闭；改为关闭每一行",
  "saved.too_many": "它有 {rows} 行，LoRA 堆栈最多 {most} 行",
};

/**
 * The words of a key, with the values that stand in it.
 *
 * @param {string} key
 * @param {Record<string, unknown>} values
 */
export function word(key, values = {}) {
  const locale = app.extensionManager?.setting?.get?.("Comfy.Locale") ?? "en";
  const words = String(locale).startsWith("zh") ? ZH : EN;
  const text = words[key] ?? EN[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (braced, name) => values[name] ?? braced);
}
